#!/bin/sh
# A head of scaled cosines alone: what the recipes with a metric loss are to be compared with.
#
#     DATA=lists WEIGHTS=ResNet50_va.pdparams MODEL=ResNet50_va TRANSFORM=resize PROCESSES=2 sh recipes/cub200_softmax.sh
#
# Data: box-cropped CUB-200 (2010), easier than the full pictures of the published table. Weights: ImageNet ResNet50_va.
# One seed, last epoch, tested at 224 pixels on classes 101-200, 2,048 dimensions. 2 cores of an AMD EPYC: 24 minutes.
# To expect:
#     recall@1 65.5, @2 75.1, @4 84.0, @8 90.6, MAP@R 22.2
# common.sh says what the environment sets, docs/results.md compares.
. "$(dirname "$0")/common.sh"
train --loss_name=normsoftmax --embedding_norm=layer \
    --pooling=max --image_shape=3,160,160 --min_area=0.16 --train_batch_size=60 \
    --label_smoothing=0.1 --optimizer=adamw --lr=1e-4 --head_lr_scale=10 --weight_decay=4e-4 \
    --lr_strategy=cosine_decay --warmup_epochs=1 --num_epochs=6 --freeze_bn=True --seed=1 "$@"
measure recall --image_shape=3,224,224
