#!/bin/sh
# ArcMargin on Stanford Online Products for a GPU: the settings of the original scripts' second edition, whose page gave
# recall@1 78.11 (softmax 77.42) with ResNet50, full pictures.
#
#     python data/sop.py Stanford_Online_Products.zip
#     DATA=Stanford_Online_Products sh recipes/sop_gpu.sh
#
# NEVER RUN by us, for want of a GPU. 129 epochs of 59,551 pictures are 7.7 million; try --num_epochs=1 first.
. "$(dirname "$0")/common.sh"
train --loss_name=arcmarginloss --margin=0.15 --head_scale=80 --pooling=avg --image_shape=3,224,224 \
    --train_batch_size=256 --optimizer=momentum --lr=0.01 --lr_strategy=piecewise_decay --lr_epochs=64,107 \
    --num_epochs=129 --seed=1 "$@"
measure recall --protocol=sop
