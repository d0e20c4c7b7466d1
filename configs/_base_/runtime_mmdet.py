"""As runtime.py, in mmdetection's scope; images of many sizes, epochs that take hours."""

_base_ = './runtime.py'

default_scope = 'mmdet'
default_hooks = dict(
    checkpoint=dict(interval=1),
    visualization=dict(type='DetVisualizationHook'),  # for `mim test ... --show-dir`
)
_base_.custom_hooks.append(dict(type='NumClassCheckHook'))  # heads against the dataset's classes
env_cfg = dict(cudnn_benchmark=False)
visualizer = dict(type='DetLocalVisualizer')
