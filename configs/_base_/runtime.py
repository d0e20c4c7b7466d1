"""What every run has in common."""

default_scope = 'mmpretrain'
runner_type = 'cae_mm.CAERunner'  # applies `settings`, fits batch and workers to the machine
custom_imports = dict(imports=['cae_mm.registry'], allow_failed_imports=False)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='cae_mm.CheckpointHook', interval=10, max_keep_ckpts=3, minutes=30),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
custom_hooks = [
    dict(type='cae_mm.SafeLoadHook'),
    dict(type='cae_mm.NumericalFaultHook'),
    dict(type='cae_mm.CollapseHook'),
    dict(type='cae_mm.UnreadableImagesHook'),
    dict(type='cae_mm.ProgressHook'),
]
# averages of the last 10 steps, of the model's metrics too
log_processor = dict(
    mean_pattern=r'.*(loss|time|data_time|grad_norm|images_per_s|acc|cos|std|codes|perplexity).*'
)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl', timeout=600),  # seconds: docs/reliability.md
)
visualizer = dict(
    type='mmpretrain.UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
)
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0, deterministic=False)  # a fixed seed, so that resuming is exact
