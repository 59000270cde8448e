# What the recipes of a data set share; they source it. From the environment, each with its default:
#   DATA       folder with the lists, CUB200_train.txt and CUB200_val.txt   (data/, which data/download_cub200.sh fills)
#   WEIGHTS    a weights file or the name `imagenet`              (imagenet)
#   MODEL      the network that these weights are of             (ResNet50)
#   TRANSFORM  center_crop; resize for pictures that are cut to the birds already   (center_crop)
#   PROCESSES  processes that train together: on a CPU of two cores 2, else one for each GPU   (1)
#   OUTPUT     where the run goes                                (output_recipes/<recipe>)
# Paths count from where you are. Flags after the recipe's name go to train.py, into a folder of their own:
#     OUTPUT=seed2 sh recipes/cub200_triplet.sh --seed=2
# A recipe that was ended goes on when it is started again.

case $1 in
-h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
esac

recipe=$(basename "$0" .sh)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
data=${DATA:-$root/data}
weights=${WEIGHTS:-imagenet}
model=${MODEL:-ResNet50}
transform=${TRANSFORM:-center_crop}
processes=${PROCESSES:-1}
output=${OUTPUT:-output_recipes/$recipe}
measured=$output/$model/latest

case $recipe in
cub200_*) set=CUB200 how="type 'sh data/download_cub200.sh', or" ;;
*) set=SOP how="the recipe's head says how to make it;" ;;
esac

fail() {
    echo "error: $*" >&2
    exit 2
}
for flag in "$@"; do
    case $flag in
    --model_save_dir*) fail "${flag%%=*}: OUTPUT=... names the folder of a recipe" ;;
    --model | --model=*) fail "${flag%%=*}: MODEL=... names the network of a recipe" ;;
    --pretrained_model*) fail "${flag%%=*}: WEIGHTS=... names what a recipe starts from" ;;
    --train_list* | --val_list* | --data_dir*) fail "${flag%%=*}: DATA=... names the folder of a recipe's lists" ;;
    esac
done
command -v "$python" > /dev/null ||
    fail "no '$python' here: type '. .venv/bin/activate' first (make quickstart makes it), or name yours: PYTHON=..."
[ -f "$data/${set}_train.txt" ] || fail "$data/${set}_train.txt is not there: $how name the lists' folder: DATA=..."
[ "$weights" = imagenet ] || [ -e "$weights" ] || [ -e "$weights.pdparams" ] || fail "WEIGHTS=$weights is not there"
case $processes in
'' | 0* | *[!0-9]*) fail "PROCESSES=$processes: a number of processes, such as 2" ;;
esac

# train <flags>: trains, and never looks at the classes of the test.
train() {
    set -- "$root/train.py" --train_list="$data/${set}_train.txt" --val_list="$data/${set}_val.txt" \
        --model="$model" --pretrained_model="$weights" --test_transform="$transform" \
        --eval_every=0 --checkpoint=auto --model_save_dir="$output" "$@"
    [ "$processes" = 1 ] || set -- -m paddle.distributed.launch --log_dir="$output/log" --nproc_per_node="$processes" "$@"
    "$python" "$@" || exit $?
}

# average <shares>: what is measured from here on is the average of the last epoch and the weights that it started from.
average() {
    "$python" "$root/weights/average.py" "$measured" "$weights" --shares="$1" --output_dir="$output/averaged" || exit $?
    measured=$output/averaged
}

# measure <name> <flags>: recall of the last epoch on unseen classes, printed and written to <output>/<name>.json.
measure() {
    name=$1
    shift
    "$python" "$root/eval.py" --val_list="$data/${set}_val.txt" --pretrained_model="$measured" \
        --output_json="$output/$name.json" "$@" || exit $?
}
