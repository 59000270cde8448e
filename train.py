"""Trains an embedding network on the classes of one list and measures recall@k on the unseen classes of another.

On a GPU where there is one:

    python train.py --model=ResNet50 --pretrained_model=<weights> --lr=0.001 --num_epochs=120 \\
        --train_batch_size=20 --loss_name=tripletloss --model_save_dir=output_tripletloss

Every epoch is evaluated on --val_list and saved to <model_save_dir>/<model>/<epoch>/; the links `latest` and `best`
beside it (best recall@1) are what eval.py, infer.py and --checkpoint take. The log goes to stdout and, as one JSON
object a line, to train_log.jsonl in the same folder.
"""

import argparse
import itertools
import math
import os
import time

import numpy as np

import checkpoints
import losses
import metrics
import models
import parallel
import reader
import resume
import utility
from utility import UserError, boolean, number


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
    add("--deterministic", type=boolean, default=False,
        help="on a GPU, take algorithms that give the same bits in each run rather than the fastest")
    add("--amp", choices=("off", "float16", "bfloat16"), default="off", help="mixed precision on a GPU")

    add = parser.add_argument_group("run").add_argument
    add("--model_save_dir", default="output", help="checkpoints and log go to <model_save_dir>/<model>/")
    add("--checkpoint", default="", help="continue a run: a checkpoint directory, or latest; auto: latest where "
        "there is one, else a new run, for jobs that are started again by a scheduler")
    add("--overwrite", type=boolean, default=False, help="delete an earlier run's checkpoints and log")
    add("--force", type=boolean, default=False, help="continue with --checkpoint although flags differ from that run's")
    add("--eval_every", type=number(int, low=0), default=1, help="epochs between evaluations; 0: none, and no best")
    add("--eval_at_start", type=boolean, default=False, help="evaluate before the first step, too")
    add("--keep", type=number(int, low=1), default=1, help="newest epochs that stay on disk, beside the best one")
    add("--save_every", type=number(int, low=0), default=0,
        help="steps between checkpoints inside an epoch; 0: only at its end. The newest one is kept")
    add("--log_every", type=number(int, low=1), default=10, help="steps between log lines")
    # fmt: on
    args, typed = utility.parse_typed(parser)
    args.train_batch_size = args.train_batch_size or args.batch_size
    return args, typed | ({"train_batch_size"} if "batch_size" in typed else set())


def main():
    args, typed = parse_args()
    utility.join_early(args)
    weights = resume.find_start(args, typed)
    continued = weights.state if args.checkpoint else None
    train, val, classes = load_lists(args, continued)
    steps = max(1, (args.total_images or len(train.paths)) // args.train_batch_size)
    lists = {"train_list": reader.fingerprint(train), "val_list": reader.fingerprint(val) if val else None}
    for name, samples in (("train_list", train), ("val_list", val)):
        if continued and samples and continued.get(name) == reader.fingerprint(samples, components=1):
            continued[name] = lists[name]  # the same list, in a checkpoint with the digests of before
    if continued and lists["train_list"] != continued.get("train_list", lists["train_list"]) and not args.force:
        raise UserError(
            f"{args.train_list}: not the pictures and labels that the run of {args.checkpoint} had; --force=True "
            "continues all the same"
        )
    args.seed = parallel.from_first(args.seed)
    resume.check_alike(args, weights, lists)

    paddle = utility.start_paddle(args.use_gpu, args.seed, args.deterministic)
    check_amp(paddle, args)
    noted = utility.note_signals()
    network = build_network(args, weights)
    optimizer = build_optimizer(paddle, args, network)
    scaler = paddle.amp.GradScaler(enable=amp_type(args) == "float16", init_loss_scaling=2.0**14)
    # What belongs to the run beside weights and optimizer; `step` counts those that are done in `epoch`.
    state = {
        "settings": {name: getattr(args, name) for name in (*models.SETTINGS, "class_dim")},
        **lists,
        "labels": classes.tolist(),
        "trained_labels": np.unique(classes[train.labels]).tolist(),
        **{"epoch": 0, "step": 0, "steps": steps, "evaluated": False, "best": None},
        "args": vars(args),
        "process": utility.describe_process(),
    }
    run_dir = os.path.join(args.model_save_dir, args.model)
    if parallel.is_first():
        resume.prepare_run_dir(args, run_dir, continued)
    parallel.meet("the run's folder")  # in which a checkpoint may have got another name
    if continued:
        resume.load_progress(args, run_dir, continued, network, optimizer, scaler, state)
        report_rate(args, continued, state)
    utility.print_arguments(args)
    if args.amp != "off" and not utility.on_gpu():
        print("note: --amp works on a GPU only: training in float32")
    parallel.meet("the start")
    checkpoints.log_json(run_dir, {"args": vars(args), "process": utility.describe_process()})

    def save():
        """Writes the checkpoint of `state`; -> its path. Of several processes the first does so, and all wait."""
        state["scaler"] = {name: np.asarray(value).tolist() for name, value in scaler.state_dict().items()}
        if parallel.is_first():
            state["log_bytes"] = checkpoints.log_size(run_dir)
            checkpoints.save_checkpoint(run_dir, network, optimizer, state)
            checkpoints.remove_old_checkpoints(run_dir, args.keep)
        parallel.meet("a checkpoint")
        return os.path.join(run_dir, checkpoints.checkpoint_name(state))

    if continued and parallel.from_first(not checkpoints.is_there(run_dir, state)):
        save()  # the run goes on in another folder, or with other steps
    if args.eval_at_start and not continued:
        evaluate(network, val, args, run_dir, -1, noted)
    for epoch in range(state["epoch"], args.num_epochs):
        if epoch > state["epoch"]:
            state.update(epoch=epoch, step=0, evaluated=False)
        elif resume.is_done(args, state):
            continue  # with the checkpoint that this run goes on from
        if state["step"] < steps:
            train_epoch(paddle, args, network, optimizer, scaler, train, state, run_dir, save, noted)
            save()  # before the evaluation, so that nothing that happens there can cost the epoch
        if not state["evaluated"] and resume.is_due(args, epoch):
            recall = evaluate(network, val, args, run_dir, epoch, noted)
            if parallel.is_first():
                resume.record_recall(args, run_dir, state, recall)
        best = state["best"]
        print(
            f"saved {os.path.join(run_dir, str(epoch))}"
            + (f", best recall@1 {best['recall@1']:.4f} in pass {best['epoch']}" if best else "")
        )
    print(f"done: {os.path.join(run_dir, 'best' if state['best'] else 'latest')}")


# ---------------------------------------------------------------- before the first step


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
    batch = args.train_batch_size if args.loss_name != "softmax" else min(args.train_batch_size, len(train.paths))
    if batch % parallel.world_size():
        raise UserError(
            f"a batch of {batch} can't be shared evenly by {parallel.world_size()} processes: take a multiple of "
            "that as --train_batch_size, which counts the images of all"
        )
    if args.loss_name != "softmax":
        reader.check_balance(len(found), args.train_batch_size, args.samples_each_class)
        small = int((np.unique(train.labels, return_counts=True)[1] < args.samples_each_class).sum())
        if small:
            print(f"note: {small} classes have fewer than {args.samples_each_class} images: drawn with replacement")
    elif args.train_batch_size > len(train.paths):
        print(f"note: batches of {len(train.paths)}: the list has no more images")
    val = reader.read_list(args.val_list, args.data_dir) if args.eval_every or args.eval_at_start else None
    for samples in [train, val] if val else [train]:
        if args.on_bad_image == "fail":
            reader.check_files(samples)
        if parallel.is_first():
            reader.report_repeated(samples)
    return train._replace(labels=np.searchsorted(classes, train.labels)), val, classes


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
    # One kernel for all parameters, where Paddle has it: a GPU would wait for the launches.
    fused = {"use_multi_tensor": utility.on_gpu()}
    if args.optimizer == "momentum":
        optimizer = paddle.optimizer.Momentum(momentum=0.9, **common, **fused)
    elif args.optimizer == "adam":
        optimizer = paddle.optimizer.Adam(**common, **fused)
    else:
        optimizer = {"sgd": paddle.optimizer.SGD, "adamw": paddle.optimizer.AdamW}[args.optimizer](**common)
    checkpoints.make_optimizer_state(optimizer, parameters)
    return optimizer


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


def rate_of_step(args, epoch, step, steps):
    """The rate of a step of an epoch with `steps`: that of its start, in the warmup of its end, for the first is 0."""
    return learning_rate(args, epoch + (step + (epoch < args.warmup_epochs)) / steps)


def report_rate(args, continued, state):
    """Says what other flags than those of the run before make of the learning rate where it goes on."""
    before = argparse.Namespace(**{**vars(args), **continued["args"]})
    epoch, step = divmod(state["epoch"] * state["steps"] + state["step"], state["steps"])
    now = rate_of_step(args, epoch, step, state["steps"])
    if epoch < args.num_epochs and not math.isclose(rate_of_step(before, epoch, step, state["steps"]), now):
        last = rate_of_step(before, continued["epoch"], continued["step"] - 1, continued["steps"])
        print(
            f"note: the learning rate was {last:.6g} at the last step and is {now:.6g} at the next: the schedule is "
            f"computed anew from --lr, --lr_strategy, --warmup_epochs and --num_epochs={args.num_epochs}"
        )


def amp_type(args):
    """float16 or bfloat16 where there is mixed precision, else None."""
    return args.amp if args.amp != "off" and utility.on_gpu() else None


def check_amp(paddle, args):
    """Raises a UserError where the GPU lacks --amp's type: Paddle would train in float32 after one warning."""
    kind = amp_type(args)
    if kind and not getattr(paddle.amp, f"is_{kind}_supported")():
        other = "float16" if kind == "bfloat16" else "off"
        raise UserError(f"--amp={kind}: this GPU can't compute in {kind}: take --amp={other}")


def training_batches(args, train, state, bad_images):
    """The rest of the epoch's batches of augmented pictures, of each this process's share, read ahead in threads."""
    epoch, shape = state["epoch"], args.image_shape[1:]
    batch = args.train_batch_size
    if args.loss_name == "softmax":
        batch = min(batch, len(train.paths))
        order = reader.shuffled_batches(len(train.paths), batch, args.seed, epoch, state["steps"])
    else:
        order = reader.class_balanced_batches(
            train.labels, batch, args.samples_each_class, args.seed, epoch, state["steps"]
        )
    return reader.read_batches(
        train,
        itertools.islice(order, state["step"], None),
        reader.training_transform(shape, args.seed, epoch, args.min_area),
        shape,
        num_workers=args.num_workers,
        bad_images=None if args.on_bad_image == "fail" else bad_images,
        replace=True,
        position=state["step"] * batch,
        share=parallel.share,
        max_pixels=args.max_pixels,
    )


def train_epoch(paddle, args, network, optimizer, scaler, train, state, run_dir, save, noted):
    """The rest of an epoch; prints and logs every --log_every steps, saves every --save_every.

    Args:
        state: says where the epoch is, and is kept up to date.
        save: function that writes the checkpoint of `state` and returns its path.
        noted: from utility.note_signals.

    Raises: Stopped after a signal, when the step is done and saved.
    """
    from losses.softmax import SoftmaxLoss

    metric_loss = losses.build_loss(args.loss_name, args.margin, args.triplet_mining)
    classification_loss = SoftmaxLoss(args.label_smoothing)
    amp = amp_type(args)
    parameters = [p for p in network.parameters() if not p.stop_gradient]
    network.train()
    if args.freeze_bn:
        network.freeze_batch_norm()
    # Each process normalises by its own pictures; their running statistics are kept alike.
    statistics = [] if args.freeze_bn else network.batch_norm_statistics()

    epoch, steps = state["epoch"], state["steps"]
    bad_images = []
    finite = paddle.to_tensor(True)
    window = {"start": time.time(), "steps": 0, "images": 0, "waited": 0.0}  # since the last log line
    batches = training_batches(args, train, state, bad_images)
    for step in range(state["step"], steps):
        start = time.time()
        batch = next(batches, None)
        if batch is None:
            raise UserError(f"not one image of a whole batch could be read: {bad_images[-1][1]}")
        window["waited"] += time.time() - start
        lr = rate_of_step(args, epoch, step, steps)
        optimizer.set_lr(lr)

        image = utility.to_device(batch.image)
        label = parallel.gather(utility.to_device(batch.label))
        # All draws depend on the step alone, so that a continued run repeats them: those of dropout in each process ...
        seed = args.seed + epoch * steps + step
        paddle.seed((seed + 1_000_003 * (1 + parallel.rank())) % 2**31)
        with paddle.amp.auto_cast(enable=amp is not None, dtype=amp or "float16"):
            embedding, logits = network(image)
        # ... and those of mining in all alike, for from here on each has the whole batch.
        embedding, logits = parallel.gather(embedding), parallel.gather(logits)
        paddle.seed(seed % 2**31)
        loss_cls = classification_loss(logits, label)
        loss_metric = paddle.zeros([]) if metric_loss is None else metric_loss(embedding, label)
        loss = loss_cls if metric_loss is None else loss_metric + args.alpha * loss_cls
        scaler.scale(loss).backward()
        parallel.sum_gradients(parameters)
        parallel.average(statistics)

        # On the CPU what is not finite is seen before it reaches the weights; on a GPU reading it would stall every
        # step, so it is looked at with the log and before a checkpoint. Scaled gradients may overflow: the scaler sees.
        finite = paddle.logical_and(finite, all_finite(loss, [] if scaler.is_enable() else parameters))
        last = step + 1 == steps
        log_now = last or step % args.log_every == 0
        save_now = not last and args.save_every > 0 and (step + 1) % args.save_every == 0
        look = log_now or save_now or not utility.on_gpu()
        if look and not finite.numpy():  # unlike item(), numpy() lets other threads run while it waits for a GPU
            raise_diverged(args, epoch, step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad()
        state["step"] = step + 1

        window["images"] += len(label)
        window["steps"] += 1
        if log_now:
            log_step(paddle, args, state, run_dir, window, lr, loss_metric, loss_cls, logits, label)
            window = {"start": time.time(), "steps": 0, "images": 0, "waited": 0.0}
        # Several processes stop at the same step; on GPUs they ask each other at log lines only.
        signal = parallel.largest(noted["signal"]) if look or parallel.world_size() == 1 else 0
        if not last and (save_now or signal):
            if not finite.numpy():
                raise_diverged(args, epoch, step)
            path = save()
            if signal:
                raise stopped(signal, path)
    bad_images = sorted(picture for part in parallel.gather_objects(bad_images) for picture in part)
    if parallel.is_first():
        reader.report_bad_images(train, bad_images)


def all_finite(loss, parameters):
    """Whether the loss and the gradients of `parameters` are free of NaN and infinity: bool scalar, not read here."""
    import paddle

    # A sum is finite where all it adds up is, and costs one small number a tensor.
    sums = [p.grad.sum() for p in parameters if p.grad is not None]
    return paddle.isfinite(paddle.stack([loss, *sums])).all()


def log_step(paddle, args, state, run_dir, window, lr, loss_metric, loss_cls, logits, label):
    """Prints and logs the step that is done, with the speed since the last such line (`window`)."""
    acc1, acc5 = (
        paddle.metric.accuracy(logits.astype("float32"), label.unsqueeze(1), k=min(k, args.class_dim)).item()
        for k in (1, 5)
    )
    epoch, step, steps = state["epoch"], state["step"] - 1, state["steps"]
    record = {
        "epoch": epoch, "step": step, "lr": lr, "loss_metric": loss_metric.item(), "loss_cls": loss_cls.item(),
        "acc1": acc1, "acc5": acc5,
    }  # fmt: skip
    seconds = time.time() - window["start"]
    left = ((args.num_epochs - epoch) * steps - step - 1) * seconds / window["steps"]
    record.update(
        sec=seconds / window["steps"],
        img_per_sec=window["images"] / seconds,
        data_wait=window["waited"] / seconds,
        peak_memory=utility.peak_memory(),
    )
    checkpoints.log_json(run_dir, record)
    print(
        f"Pass {epoch}, trainbatch {step}, lr {lr:.6g}, loss_metric {record['loss_metric']:.4f}, "
        f"loss_cls {record['loss_cls']:.4f}, acc1 {acc1:.4f}, acc5 {acc5:.4f}, time {record['sec']:.2f} sec, "
        f"{record['img_per_sec']:.1f} img/s, data wait {record['data_wait']:.1%}, "
        f"memory {record['peak_memory'] / 2**30:.2f} GiB, left {utility.duration(left)}",
        flush=True,
    )


def raise_diverged(args, epoch, step):
    raise UserError(
        f"the loss or a gradient became NaN or infinite in pass {epoch}, trainbatch {step}; last good checkpoint: "
        f"{resume.last_checkpoint(args) or 'none yet'}; try a smaller --lr than {args.lr:g}, --warmup_epochs=1"
        + (", --amp=bfloat16" if args.amp == "float16" else "")
    )


def stopped(signal, path):
    """What ends the run after a signal; `path`: the checkpoint to go on from, or None."""
    saved = f"saved {path}; --checkpoint=latest goes on from there" if path else "nothing to save yet"
    return utility.Stopped(128 + signal, f"stopped: {saved}")


# ---------------------------------------------------------------- evaluation


def evaluate(network, val, args, run_dir, epoch, noted):
    """Prints and logs recall@1,2,4,8 on the validation list; -> recall@1, or None in all but the first process.

    Raises: Stopped after a signal.
    """
    start, bad = time.time(), []
    batches = reader.read_in_order(val, args, args.test_batch_size, bad)
    features, index = utility.extract(network, val, batches, bad, noted=noted)
    if noted["agreed"]:
        raise stopped(noted["agreed"], resume.last_checkpoint(args))
    if not parallel.is_first():
        return None
    reader.report_bad_images(val, bad)
    result = metrics.retrieval_metrics(features, val.labels[index], recall_at=(1, 2, 4, 8), full=False)
    seconds = time.time() - start
    checkpoints.log_json(run_dir, {"epoch": epoch, "eval": result, "sec": seconds})
    recalls = ", ".join(f"recall@{k} {result[f'recall@{k}']:.4f}" for k in (1, 2, 4, 8))
    print(
        f"Pass {epoch}, {recalls}, {len(index)} images of {len(np.unique(val.labels))} classes, time {seconds:.2f} sec"
    )
    return result["recall@1"]


if __name__ == "__main__":
    utility.run_script(main)
