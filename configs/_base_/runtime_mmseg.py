"""As runtime.py, in mmsegmentation's scope and counted in iterations."""

_base_ = './runtime.py'

default_scope = 'mmseg'
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=16_000),
    visualization=dict(type='mmseg.SegVisualizationHook'),  # for `mim test ... --show-dir`
)
log_processor = dict(by_epoch=False)
visualizer = dict(type='mmseg.SegLocalVisualizer')
