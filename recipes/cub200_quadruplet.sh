#!/bin/sh
# Quadruplet loss (margin sample mining), a tenth of it beside a linear head: of each batch it moves two pairs alone, the
# farthest positives and the closest negatives, and at full weight recall is lower (docs/results.md).
#
#     sh data/download_cub200.sh && PROCESSES=2 sh recipes/cub200_quadruplet.sh     # the full pictures: other figures
#     DATA=lists WEIGHTS=ResNet50_va.pdparams MODEL=ResNet50_va TRANSFORM=resize PROCESSES=2 sh recipes/cub200_quadruplet.sh
#
# Data: box-cropped CUB-200 (2010), easier than the full pictures of the published table. Weights: ImageNet ResNet50_va.
# One seed, last epoch, tested at 224 pixels on classes 101-200, 2,048 dimensions. 2 cores of an AMD EPYC with AVX-512: 9 minutes.
# To expect:
#     recall@1 67.4, @2 77.7, @4 86.1, @8 92.4, MAP@R 23.1; the last epoch
#     recall@1 67.3, @2 78.1, @4 86.9, @8 92.4, MAP@R 22.6; averaged: 0.7 of it and 0.3 of the ImageNet weights
# Without the metric loss: cub200_softmax.sh. common.sh says what the environment sets, docs/results.md compares.
. "$(dirname "$0")/common.sh"
train --loss_name=quadrupletloss --margin=0.2 --alpha=10 --embedding_norm=layer \
    --pooling=max --image_shape=3,160,160 --min_area=0.16 --train_batch_size=60 --samples_each_class=4 --freeze_stages=2 \
    --optimizer=adamw --lr=1e-4 --head_lr_scale=10 --weight_decay=4e-4 \
    --lr_strategy=cosine_decay --warmup_epochs=1 --num_epochs=6 --freeze_bn=True --seed=1 "$@"
measure recall --image_shape=3,224,224
average 0.7,0.3
measure averaged --image_shape=3,224,224
