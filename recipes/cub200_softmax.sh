#!/bin/sh
# A head of scaled cosines alone: what the recipes with a metric loss are to be compared with.
#
#     sh data/download_cub200.sh && PROCESSES=2 sh recipes/cub200_softmax.sh     # the full pictures: other figures
#     DATA=lists WEIGHTS=ResNet50_va.pdparams MODEL=ResNet50_va TRANSFORM=resize PROCESSES=2 sh recipes/cub200_softmax.sh
#
# Data: box-cropped CUB-200 (2010), easier than the full pictures of the published table. Weights: ImageNet ResNet50_va.
# One seed, last epoch, tested at 224 pixels on classes 101-200, 2,048 dimensions. 2 cores of an AMD EPYC with
# AVX-512: 16 minutes. To expect:
#     recall@1 65.2, @2 75.1, @4 83.7, @8 90.6, MAP@R 22.3; the last epoch
#     recall@1 67.8, @2 77.7, @4 85.5, @8 91.8, MAP@R 23.1; averaged: 0.7 of it and 0.3 of the ImageNet weights
# common.sh says what the environment sets, docs/results.md compares.
. "$(dirname "$0")/common.sh"
train --loss_name=normsoftmax --embedding_norm=layer \
    --pooling=max --image_shape=3,160,160 --min_area=0.16 --train_batch_size=60 --freeze_stages=2 \
    --label_smoothing=0.1 --optimizer=adamw --lr=1e-4 --head_lr_scale=10 --weight_decay=4e-4 \
    --lr_strategy=cosine_decay --warmup_epochs=1 --num_epochs=6 --freeze_bn=True --seed=1 "$@"
measure recall --image_shape=3,224,224
average 0.7,0.3
measure averaged --image_shape=3,224,224
