#!/bin/sh
# The table of the original page, three losses and two networks, on drawn birds: anyone can repeat it without a download.
#
#     PROCESSES=2 sh recipes/sample_table.sh
#
# Draws 96 species, trains each cell for 20 epochs from random weights at 64 pixels, and prints recall@1 on the 48 species
# that training never saw, beside the untrained networks'. Runs that were ended go on when it is started again.
# 2 cores of an AMD EPYC with AVX-512, two processes, seed 1: 50 minutes. To expect, ResNet50 and SE_ResNeXt50_32x4d:
#     untrained 15.1 10.6, triplet 77.1 77.1, EML 75.8 75.6, quadruplet 74.7 72.3
# From the environment: PROCESSES (1), PYTHON (python), OUTPUT (output_recipes/sample_table).
[ $# = 0 ] || {
    echo "error: $1: this recipe takes no flags; its head says what the environment sets" >&2
    exit 2
}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
processes=${PROCESSES:-1}
output=${OUTPUT:-output_recipes/sample_table}
birds=$output/birds

command -v "$python" > /dev/null || {
    echo "error: no '$python' here: type '. .venv/bin/activate' first (make quickstart makes it), or name yours: PYTHON=..." >&2
    exit 2
}
set -e

# measure <name> <flags>: recall on species that training never sees, printed and written to <output>/<name>.json.
measure() {
    name=$1
    shift
    "$python" "$root/eval.py" --val_list="$birds/birds_val.txt" --output_json="$output/$name.json" "$@"
}

# train <model> <flags>: twenty epochs from random weights; goes on where it was ended.
train() {
    set -- "$root/train.py" --train_list="$birds/birds_train.txt" --val_list="$birds/birds_val.txt" --model="$@" \
        --image_shape=3,64,64 --test_transform=resize --zero_init_residual=True --min_area=0.7 \
        --optimizer=adamw --lr=0.001 --lr_strategy=cosine_decay --warmup_epochs=1 --num_epochs=20 \
        --train_batch_size=40 --samples_each_class=4 --eval_every=0 --seed=1 --checkpoint=auto
    [ "$processes" = 1 ] || set -- -m paddle.distributed.launch --log_dir="$output/log" --nproc_per_node="$processes" "$@"
    "$python" "$@"
}

[ -f "$birds/birds_val.txt" ] || "$python" "$root/data/make_sample.py" --output_dir="$birds"
for model in ResNet50 SE_ResNeXt50_32x4d; do
    measure "untrained_$model" --model=$model --image_shape=3,64,64 --test_transform=resize --seed=1
    for loss in "tripletloss --margin=0.3" "emlloss --alpha=100" "quadrupletloss --margin=0.3 --alpha=10"; do
        name=${loss%% *}_$model
        # shellcheck disable=SC2086  # the loss and its flags are words
        train $model --loss_name=$loss --model_save_dir="$output/$name"
        measure "$name" --pretrained_model="$output/$name/$model/latest"
    done
done

"$python" - "$output" <<'EOF'
import json
import sys

def recall(name, model):
    with open(f"{sys.argv[1]}/{name}_{model}.json") as file:
        return 100 * json.load(file)["recall@1"]

models = ("ResNet50", "SE_ResNeXt50_32x4d")
print("\n| recall@1 | " + " | ".join(models) + " |\n|---|---|---|")
for name in ("untrained", "tripletloss", "emlloss", "quadrupletloss"):
    print(f"| {name} | " + " | ".join(f"{recall(name, model):.1f}" for model in models) + " |")
EOF
