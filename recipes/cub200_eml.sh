#!/bin/sh
. "$(dirname "$0")/common.sh"
train --loss_name=emlloss --alpha=100 --head=cosine --embedding_norm=layer \
    --pooling=max --image_shape=3,160,160 --min_area=0.16 --train_batch_size=60 --samples_each_class=4 \
    --label_smoothing=0.1 --optimizer=adamw --lr=1e-4 --head_lr_scale=10 --weight_decay=4e-4 \
    --lr_strategy=cosine_decay --warmup_epochs=1 --num_epochs=6 --freeze_bn=True --seed=1 "$@"
measure recall --image_shape=3,224,224
