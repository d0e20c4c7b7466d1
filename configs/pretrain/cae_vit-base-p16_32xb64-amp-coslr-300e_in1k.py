"""CAE-B, 300 epochs, DALL-E tokens.

    torchrun --nproc-per-node 8 --nnodes 4 ... tools/train.py THIS_FILE --launcher pytorch

Paper and official code: 64.5 linear, 74.0 attentive, 83.6 fine-tuned.
"""

_base_ = [
    '../_base_/models/cae_vit-base-p16.py',
    '../_base_/datasets/in1k_two-view_224.py',
    '../_base_/schedules/cae_adamw_32xb64_300e.py',
    '../_base_/runtime.py',
]
