#!/bin/sh
# Proxy-Anchor on normed features, without a head loss.
#
#     DATA=lists WEIGHTS=ResNet50_va.pdparams MODEL=ResNet50_va TRANSFORM=resize PROCESSES=2 sh recipes/cub200_proxyanchor.sh
#
# Data: box-cropped CUB-200 (2010), easier than the full pictures of the published table. Weights: ImageNet ResNet50_va.
# One seed, last epoch, tested at 224 pixels on classes 101-200, 2,048 dimensions. 2 cores of an AMD EPYC: 8 minutes.
# To expect:
#     recall@1 66.6, @2 75.9, @4 84.4, @8 91.4, MAP@R 22.9
# common.sh says what the environment sets, docs/results.md compares.
. "$(dirname "$0")/common.sh"
train --loss_name=proxyanchorloss --embedding_norm=layer \
    --pooling=max --image_shape=3,160,160 --min_area=0.16 --train_batch_size=60 \
    --optimizer=adamw --lr=1e-4 --weight_decay=4e-4 \
    --lr_strategy=cosine_decay --warmup_epochs=1 --num_epochs=2 --freeze_bn=True --seed=1 "$@"
measure recall --image_shape=3,224,224
