"""Trains an embedding network on the classes of one list and measures recall@k on the unseen classes of another.

On a GPU where there is one:

    python train.py --model=ResNet50 --pretrained_model=<weights> --lr=0.001 --num_epochs=120 \\
        --train_batch_size=20 --loss_name=tripletloss --model_save_dir=output_tripletloss

Every epoch is evaluated on --val_list and saved to <model_save_dir>/<model>/<epoch>/; the links `latest` and `best`
beside it (best recall@1) are what eval.py, infer.py and --checkpoint take. The log goes to stdout and, as one JSON
object a line, to train_log.jsonl in the same folder.
"""

import math
import os
import random
import time

import numpy as np

import losses
import metrics
import models
import reader
import utility
from utility import UserError, boolean, number

# Another value of one of these makes a continued run another run.
SAME_RUN = ("loss_name", "train_batch_size", "samples_each_class", "optimizer", "freeze_bn", "seed", "total_images")
# What a continued run does not take over from the run it continues.
THIS_PROCESS = ("checkpoint", "force", "overwrite", "model_save_dir", "pretrained_model", "use_gpu", "num_workers")


def parse_args():
    """-> (all flags, the names of those that were typed)"""
    parser = utility.make_parser(__doc__)
    reader.add_data_arguments(parser)
    models.add_model_arguments(parser)
    losses.add_loss_arguments(parser)

    # fmt: off
    add = parser.add_argument_group("batches").add_argument
    add("--batch_size", type=number(int, low=1), default=256, help="images a step, for training")
    add("--train_batch_size", type=number(int, low=1), help="the same, and goes before --batch_size")
    add("--test_batch_size", type=number(int, low=1), default=32, help="images at once in evaluation")
    add("--total_images", type=number(int, low=1), help="images an epoch (default: the length of --train_list)")
    add("--min_area", type=number(float, above=0, high=1), default=0.08,
        help="smallest share of a picture that a random crop may keep; 0.08 is the original, 0.16 to 0.5 suits "
        "pictures that are cut to the object already")

    add = parser.add_argument_group("optimizer").add_argument
    add("--num_epochs", type=number(int, low=1), default=120, help="epochs to train")
    add("--optimizer", choices=("momentum", "sgd", "adam", "adamw"), default="momentum", help="momentum: the original")
    add("--lr", type=number(float, low=0), default=0.1,
        help="learning rate; 0.1 is for momentum and a batch of 256 from scratch, 0.001 for fine-tuning; for adam and "
        "adamw 0.001 from scratch, 1e-5 to 1e-4 for fine-tuning")
    add("--head_lr_scale", type=number(float, low=0), default=1.0,
        help="learning rate of the head and the embedding layer, as a multiple of --lr; 10 suits fine-tuning, where "
        "they are the only parts that start from nothing")
    add("--lr_strategy", choices=("piecewise_decay", "cosine_decay", "constant"), default="piecewise_decay",
        help="piecewise_decay: a tenth after each of --lr_epochs; cosine_decay: to 0 at the last step")
    add("--lr_epochs", type=utility.comma_separated(number(float, above=0)),
        help="epochs at which piecewise_decay steps down, such as 30,60,90 (default: a quarter, a half and three "
        "quarters of --num_epochs)")
    add("--warmup_epochs", type=number(float, low=0), default=0.0, help="epochs in which the rate rises to --lr")
    add("--weight_decay", type=number(float, low=0), default=1e-4, help="L2 penalty; for adamw the decoupled decay")
    add("--freeze_bn", type=boolean, default=False, help="keep batch-norm statistics and scales: pays in fine-tuning")
    add("--zero_init_residual", type=boolean, default=False, help="start blocks as identity: pays from scratch")
    add("--with_mem_opt", type=boolean, default=False,
        help="compute activations again in the backward pass: about half the memory, a third more time")
    add("--amp", choices=("off", "float16", "bfloat16"), default="off", help="mixed precision on a GPU")

    add = parser.add_argument_group("run").add_argument
    add("--model_save_dir", default="output", help="checkpoints and log go to <model_save_dir>/<model>/")
    add("--checkpoint", default="", help="continue a run: a checkpoint directory, or latest")
    add("--overwrite", type=boolean, default=False, help="delete an earlier run's checkpoints and log")
    add("--force", type=boolean, default=False, help="continue with --checkpoint although flags differ from that run's")
    add("--eval_every", type=number(int, low=0), default=1, help="epochs between evaluations; 0: none, and no best")
    add("--eval_at_start", type=boolean, default=False, help="evaluate before the first step, too")
    add("--keep", type=number(int, low=1), default=1, help="newest epochs that stay on disk, beside the best one")
    add("--log_every", type=number(int, low=1), default=10, help="steps between log lines")
    # fmt: on
    args, typed = utility.parse_typed(parser)
    args.train_batch_size = args.train_batch_size or args.batch_size
    return args, typed | ({"train_batch_size"} if "batch_size" in typed else set())


def main():
    args, typed = parse_args()
    weights = find_start(args, typed)
    continued = weights.state if args.checkpoint else None
    train, val, classes = load_lists(args, continued)
    steps = max(1, (args.total_images or len(train.paths)) // args.train_batch_size)
    if continued and steps != continued["steps"] and not args.force:
        raise UserError(
            f"{args.train_list}: gives {steps} steps an epoch, the run of {args.checkpoint} had "
            f"{continued['steps']}: another list? --force=True continues all the same"
        )

    paddle = utility.start_paddle(args.use_gpu, args.seed)
    network = build_network(args, weights)
    optimizer = build_optimizer(paddle, args, network)
    first_epoch, best = 0, None
    run_dir = prepare_run_dir(args, continued)
    if continued:
        if args.optimizer == continued["args"]["optimizer"]:
            saved = models.read_pickle(os.path.join(args.checkpoint, utility.OPTIMIZER_FILE))
            utility.load_optimizer_state(network, optimizer, saved)
        else:
            print(f"note: {args.optimizer} starts anew: it can't use the state of {continued['args']['optimizer']}")
        first_epoch = continued["epoch"] + 1
        best = continued["best"]
        if best and best["epoch"] in utility.checkpoint_epochs(run_dir):
            utility.point_at(run_dir, "best", best["epoch"])
        else:  # in another folder, or deleted since
            best = None
        utility.compare_process(continued["process"])

    log = os.path.join(run_dir, utility.LOG_FILE)
    utility.print_arguments(args)
    if args.amp != "off" and not utility.on_gpu():
        print("note: --amp works on a GPU only: training in float32")
    utility.log_json(log, {"args": vars(args), "process": utility.describe_process()})
    if args.eval_at_start and not continued:
        evaluate(network, val, args, log, epoch=-1)
    for epoch in range(first_epoch, args.num_epochs):
        train_epoch(paddle, args, network, optimizer, train, epoch, steps, log)
        state = {
            "settings": {name: getattr(args, name) for name in (*models.SETTINGS, "class_dim")},
            "labels": classes.tolist(),
            "trained_labels": np.unique(classes[train.labels]).tolist(),
            "steps": steps,
            "best": best,
            "args": vars(args),
            "process": utility.describe_process(),
        }
        # Before the evaluation, so that nothing that happens there can cost the epoch.
        path = utility.save_checkpoint(run_dir, epoch, network, optimizer, state)
        if args.eval_every and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.num_epochs):
            recall = evaluate(network, val, args, log, epoch)
            if best is None or recall > best["recall@1"]:
                best = {"recall@1": recall, "epoch": epoch}
                utility.write_checkpoint_state(path, epoch, {**state, "best": best})
                utility.point_at(run_dir, "best", epoch)
        utility.remove_old_checkpoints(run_dir, args.keep)
        print(f"saved {path}" + (f", best recall@1 {best['recall@1']:.4f} in pass {best['epoch']}" if best else ""))
    print(f"done: {os.path.join(run_dir, 'best' if best else 'latest')}")


# ---------------------------------------------------------------- before the first step


def find_start(args, typed):
    """Reads --checkpoint or --pretrained_model and settles flags and seed; -> models.Weights or None."""
    if args.checkpoint and args.pretrained_model:
        raise UserError("--checkpoint continues a run with its own weights: --pretrained_model has no place beside it")
    if args.checkpoint == "latest":
        args.checkpoint = find_latest(args)
    if args.checkpoint:
        continue_run(args, typed)
        return models.read_weights(args.checkpoint)
    model = args.model or models.DEFAULT_MODEL
    weights = models.read_weights(args.pretrained_model, model) if args.pretrained_model else None
    models.settle_arguments(args, weights.state if weights else None, () if args.allow_partial else ("model",))
    args.seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    return weights


def find_latest(args):
    """The path that --checkpoint=latest means."""
    names = [args.model] if args.model else models.MODELS
    runs = [n for n in names if os.path.exists(os.path.join(args.model_save_dir, n, "latest", utility.CHECKPOINT_FILE))]
    if not runs:
        raise UserError(f"{args.model_save_dir}: --checkpoint=latest, but there is no checkpoint to continue")
    if len(runs) > 1:
        raise UserError(f"{args.model_save_dir}: --checkpoint=latest needs --model, one of {', '.join(runs)}")
    return os.path.join(args.model_save_dir, runs[0], "latest")


def continue_run(args, typed):
    """Takes every flag that was not typed over from the run that wrote `args.checkpoint`.

    Raises: UserError where a typed one makes it another run.
    """
    state = utility.read_checkpoint_state(args.checkpoint)
    models.settle_arguments(args, state, fixed=tuple(models.SETTINGS))
    before = state["args"]
    for name in set(before) - typed - set(THIS_PROCESS):
        setattr(args, name, before[name])
    if "model_save_dir" not in typed:
        args.model_save_dir = os.path.normpath(os.path.join(args.checkpoint, os.pardir, os.pardir))
    changed = {n: f"--{n}={getattr(args, n)} (was {before[n]})" for n in sorted(typed & set(before) - set(THIS_PROCESS))
               if getattr(args, n) != before[n]}  # fmt: skip
    forbidden = [what for name, what in changed.items() if name in SAME_RUN]
    if forbidden and not args.force:
        raise UserError(f"{args.checkpoint}: another run: {', '.join(forbidden)}; --force=True continues all the same")
    if changed:
        print(f"note: the run goes on with {', '.join(changed.values())}")
    if state["epoch"] + 1 >= args.num_epochs:
        raise UserError(
            f"{args.checkpoint}: has all of its {state['epoch'] + 1} epochs: a larger --num_epochs than "
            f"{args.num_epochs} goes on"
        )


def load_lists(args, state):
    """Reads and checks both lists; -> (training Samples, validation Samples or None, the classes' labels in order).

    The training labels become class indices: themselves where all fit below a given --class_dim (so that a head of
    ImageNet keeps its meaning), else their rank.
    """
    train = reader.read_list(args.train_list, args.data_dir)
    found = np.unique(train.labels)
    if state:
        classes = np.array(state["labels"], np.int64)
        if not np.isin(found, classes).all():
            raise UserError(f"{args.train_list}: has classes that the run of {args.checkpoint} did not have")
    elif args.class_dim and found[0] >= 0 and found[-1] < args.class_dim:
        classes = np.arange(args.class_dim)
    else:
        classes = found
    args.class_dim = args.class_dim or len(classes)
    if args.class_dim < len(found):
        raise UserError(f"--class_dim={args.class_dim} is less than the {len(found)} classes of {args.train_list}")
    if args.loss_name != "softmax":
        reader.check_balance(len(found), args.train_batch_size, args.samples_each_class)
        small = int((np.unique(train.labels, return_counts=True)[1] < args.samples_each_class).sum())
        if small:
            print(f"note: {small} classes have fewer than {args.samples_each_class} images: drawn with replacement")
    elif args.train_batch_size > len(train.paths):
        print(f"note: batches of {len(train.paths)}: the list has no more images")
    val = reader.read_list(args.val_list, args.data_dir) if args.eval_every or args.eval_at_start else None
    if args.on_bad_image == "fail":
        reader.check_files(train)
        if val:
            reader.check_files(val)
    return train._replace(labels=np.searchsorted(classes, train.labels)), val, classes


def prepare_run_dir(args, continued):
    """Creates <model_save_dir>/<model>; an earlier run in it is only touched with --checkpoint or --overwrite."""
    run_dir = os.path.join(args.model_save_dir, args.model)
    epochs = utility.checkpoint_epochs(run_dir)
    if continued and os.path.realpath(run_dir) == os.path.dirname(os.path.realpath(args.checkpoint)):
        later = [epoch for epoch in epochs if epoch > continued["epoch"]]
        if later and not args.overwrite:
            raise UserError(
                f"{args.checkpoint}: the run has later epochs ({', '.join(map(str, later))}): --checkpoint=latest goes "
                "on from the last, --overwrite=True deletes them, another --model_save_dir keeps them"
            )
        utility.make_directory(run_dir)
        utility.remove_checkpoints(run_dir, later)
    elif epochs and not args.overwrite:
        raise UserError(
            f"{run_dir}: holds an earlier run: continue it with --checkpoint=latest, delete it with --overwrite=True, "
            "or take another --model_save_dir"
        )
    else:
        utility.make_directory(run_dir)
        utility.set_run_aside(run_dir)
    return run_dir


def build_network(args, weights):
    network = models.build_model(args.model, args.class_dim, args.pooling, args.embedding_size)
    if args.zero_init_residual:
        network.backbone.zero_init_residual()
    if args.with_mem_opt:
        network.backbone.use_recompute()
    if weights:
        head = "must" if args.checkpoint else "fit"
        print(models.load_weights(network, weights, args.model, head, args.allow_partial))
    if args.freeze_bn:
        network.freeze_batch_norm()
    return network


def build_optimizer(paddle, args, network):
    for layer in (network.head, network.embedding):
        for parameter in layer.parameters():
            parameter.optimize_attr["learning_rate"] = args.head_lr_scale
    parameters = [p for p in network.parameters() if not p.stop_gradient]
    common = {"learning_rate": args.lr, "parameters": parameters, "weight_decay": args.weight_decay}
    if args.optimizer == "momentum":
        return paddle.optimizer.Momentum(momentum=0.9, **common)
    return {"sgd": paddle.optimizer.SGD, "adam": paddle.optimizer.Adam, "adamw": paddle.optimizer.AdamW}[
        args.optimizer
    ](**common)


# ---------------------------------------------------------------- training


def learning_rate(args, epoch):
    """The rate at `epoch`, a float: 1.5 is in the middle of the second epoch."""
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    if args.lr_strategy == "cosine_decay":
        share = (epoch - args.warmup_epochs) / max(args.num_epochs - args.warmup_epochs, 1e-9)
        return args.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1)))
    if args.lr_strategy == "piecewise_decay":
        boundaries = args.lr_epochs or [args.num_epochs * share for share in (0.25, 0.5, 0.75)]
        return args.lr * 0.1 ** sum(epoch >= boundary for boundary in boundaries)
    return args.lr


def training_batches(args, train, epoch, steps, bad_images):
    """The epoch's batches of augmented pictures, read ahead in threads."""
    shape = args.image_shape[1:]
    if args.loss_name == "softmax":
        order = reader.shuffled_batches(len(train.paths), args.train_batch_size, args.seed, epoch, steps)
    else:
        order = reader.class_balanced_batches(
            train.labels, args.train_batch_size, args.samples_each_class, args.seed, epoch, steps
        )
    return reader.read_batches(
        train,
        order,
        reader.training_transform(shape, args.seed, epoch, args.min_area),
        shape,
        num_workers=args.num_workers,
        bad_images=None if args.on_bad_image == "fail" else bad_images,
        # Another picture of the class keeps the batch balanced.
        replace=lambda index: np.setdiff1d(np.flatnonzero(train.labels == train.labels[index]), index),
    )


def train_epoch(paddle, args, network, optimizer, train, epoch, steps, log):
    """One pass of `steps` batches; prints and logs every `log_every` steps."""
    from losses.softmax import SoftmaxLoss

    metric_loss = losses.build_loss(args.loss_name, args.margin, args.triplet_mining)
    classification_loss = SoftmaxLoss(args.label_smoothing)
    amp = args.amp != "off" and utility.on_gpu()
    # A new one each epoch, so that a continued run needs nothing of the old one.
    scaler = paddle.amp.GradScaler(enable=amp and args.amp == "float16", init_loss_scaling=2.0**14)
    top = [min(k, args.class_dim) for k in (1, 5)]
    network.train()
    if args.freeze_bn:
        network.freeze_batch_norm()

    bad_images = []
    finite = paddle.to_tensor(True)
    steps_since, images, waited, last_log = 0, 0, 0.0, time.time()
    batches = training_batches(args, train, epoch, steps, bad_images)
    for step in range(steps):
        start = time.time()
        batch = next(batches, None)
        if batch is None:
            raise UserError(f"not one image of a whole batch could be read: {bad_images[-1][1]}")
        waited += time.time() - start
        # The draws of mining and dropout depend on the step alone, so that a continued run repeats them.
        paddle.seed((args.seed + epoch * steps + step) % 2**31)
        lr = learning_rate(args, epoch + (step + 1) / steps if epoch < args.warmup_epochs else epoch + step / steps)
        optimizer.set_lr(lr)

        image, label = paddle.to_tensor(batch.image), paddle.to_tensor(batch.label)
        with paddle.amp.auto_cast(enable=amp, dtype=args.amp if amp else "float16"):
            embedding, logits = network(image)
        loss_cls = classification_loss(logits, label)
        loss_metric = paddle.zeros([]) if metric_loss is None else metric_loss(embedding, label)
        loss = loss_cls if metric_loss is None else loss_metric + args.alpha * loss_cls

        # On the CPU a bad loss is seen before it reaches the weights; on a GPU reading it here would stall every step.
        finite = paddle.logical_and(finite, paddle.isfinite(loss).all())
        log_now = step % args.log_every == 0 or step + 1 == steps
        if (log_now or not utility.on_gpu()) and not finite.item():
            raise_diverged(args, epoch, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad()

        images += len(batch.index)
        steps_since += 1
        if log_now:
            acc1, acc5 = (paddle.metric.accuracy(logits.astype("float32"), label.unsqueeze(1), k=k).item() for k in top)
            record = {
                "epoch": epoch, "step": step, "lr": lr, "loss_metric": loss_metric.item(), "loss_cls": loss_cls.item(),
                "acc1": acc1, "acc5": acc5,
            }  # fmt: skip
            seconds = time.time() - last_log
            left = ((args.num_epochs - epoch) * steps - step - 1) * seconds / steps_since
            record.update(sec=seconds / steps_since, img_per_sec=images / seconds, data_wait=waited / seconds)
            utility.log_json(log, record)
            print(
                f"Pass {epoch}, trainbatch {step}, lr {lr:.6g}, loss_metric {record['loss_metric']:.4f}, "
                f"loss_cls {record['loss_cls']:.4f}, acc1 {acc1:.4f}, acc5 {acc5:.4f}, time {record['sec']:.2f} sec, "
                f"{record['img_per_sec']:.1f} img/s, data wait {record['data_wait']:.1%}, "
                f"left {utility.duration(left)}",
                flush=True,
            )
            steps_since, images, waited, last_log = 0, 0, 0.0, time.time()
    reader.report_bad_images(train, bad_images)


def raise_diverged(args, epoch, step):
    latest = os.path.join(args.model_save_dir, args.model, "latest")
    good = os.path.realpath(latest) if os.path.lexists(latest) else "none yet"
    raise UserError(
        f"the loss became NaN or infinite in pass {epoch}, trainbatch {step}; last good checkpoint: {good}; try a "
        f"smaller --lr than {args.lr:g}, --warmup_epochs=1" + (", --amp=bfloat16" if args.amp == "float16" else "")
    )


def evaluate(network, val, args, log, epoch):
    """Prints and logs recall@1,2,4,8 on the validation list; -> recall@1."""
    start, bad = time.time(), []
    batches = reader.read_in_order(val, args, args.test_batch_size, bad)
    features, index = utility.extract(network, val, batches)
    reader.report_bad_images(val, bad)
    result = metrics.retrieval_metrics(features, val.labels[index], recall_at=(1, 2, 4, 8), full=False)
    seconds = time.time() - start
    utility.log_json(log, {"epoch": epoch, "eval": result, "sec": seconds})
    recalls = ", ".join(f"recall@{k} {result[f'recall@{k}']:.4f}" for k in (1, 2, 4, 8))
    print(
        f"Pass {epoch}, {recalls}, {len(index)} images of {len(np.unique(val.labels))} classes, time {seconds:.2f} sec"
    )
    return result["recall@1"]


if __name__ == "__main__":
    utility.run_script(main)
