#!/bin/sh
# Softmax alone on CUB-200 for a GPU, after Boudiaf et al., "A unifying mutual information view of metric learning"
# (https://arxiv.org/abs/2003.08983), who report recall@1 69.2 with ResNet50, 2,048 dimensions, on the full pictures of
# CUB-200-2011.
#
#     sh data/download_cub200.sh 2011
#     sh recipes/cub200_gpu.sh
#
# NEVER RUN by us, for want of a GPU: the settings are the paper's, which picked the best epoch on the test classes; this
# takes the last. Where memory does not suffice: --train_batch_size=64 --lr=0.01, or --amp=bfloat16.
. "$(dirname "$0")/common.sh"
train --loss_name=softmax --label_smoothing=0.1 --dropout=0.5 --pooling=avg --image_shape=3,224,224 \
    --min_area=0.16 --color_jitter=0.25 --train_batch_size=128 --optimizer=sgd --lr=0.02 --weight_decay=5e-4 \
    --lr_strategy=cosine_decay --warmup_epochs=2 --num_epochs=30 --freeze_bn=True --seed=1 "$@"
measure recall
