#!/usr/bin/env python3
"""Trains an embedding network on the classes of one list and measures recall@k on the unseen classes of another.

On a GPU where there is one:

    python train.py --model=ResNet50 --pretrained_model=imagenet --lr=0.001 \\
        --num_epochs=120 --train_batch_size=20 --model_save_dir=output_triplet

Every epoch is saved to <model_save_dir>/<model>/<epoch>/ and, as often as --eval_every says, evaluated on --val_list;
the links `latest` and `best` beside it (best recall@1) are what eval.py, infer.py and --checkpoint take. The log goes
to stdout and, as one JSON object a line, to train_log.jsonl in the same folder.
"""

from runtime import packages

packages.check()

import argparse
import contextlib
import dataclasses
import os
import time

import numpy as np

import losses
import models
import reader
import utility
import weights
from retrieval import extraction, metrics
from runtime import parallel, process
from training import data, folder, optimizers, run_settings, start
from training.ema import Average
from training.job import (
    Job,
    check_finite,
    record_recall,
    save,
    save_or_stop,
    shares_each_step,
    stop_if_told,
    stopped,
    what_is_due,
)  # fmt: skip
from training.log import RunLog, summary
from training.optimizers import trained_parameters
from training.parts import Parts, loss_scale
from training.run import LOG_FILE, Progress, Run
from utility import fill


def build_parser():
    parser = utility.make_parser(__doc__)
    run_settings.add_run_arguments(parser)
    losses.add_loss_arguments(parser)
    data.add_batch_arguments(parser)
    optimizers.add_optimizer_arguments(parser)
    reader.add_data_arguments(parser)
    models.add_model_arguments(parser)
    weights.add_weight_arguments(parser)
    first = ("train_list", "val_list", "model", "pretrained_model", "loss_name", "lr", "train_batch_size", "num_epochs")
    utility.start_here(parser, (*first, "model_save_dir", "checkpoint"))
    return parser


def parse(parser):
    """-> (all flags, the names of those that were typed); --batch_size is --train_batch_size by then."""
    args, typed = utility.parse_typed(parser)
    args.train_batch_size = args.train_batch_size or args.batch_size
    return args, typed | ({"train_batch_size"} if "batch_size" in typed else set())


def main():
    # What to do: the flags, and what a checkpoint says where they leave it open.
    parser = build_parser()
    args, typed = parse(parser)
    process.join_early(args.use_gpu, args.seed)
    begin = start.find_start(vars(args), typed, parser)
    args = argparse.Namespace(**begin.flags)
    args.seed = parallel.from_first(args.seed)
    settings, reading = fill(run_settings.RunSettings, args), fill(reader.Reading, args)
    batching = fill(data.Batching, args, typed="train_batch_size" in typed or bool(begin.before))
    schedule = fill(optimizers.Schedule, args)
    lists = data.load_data(
        fill(data.Lists, args), batching, reading, args.class_dim, begin.labels, begin.checkpoint, settings.evaluates
    )
    args.train_batch_size = lists.batch_size if batching.balanced else args.train_batch_size
    digests = data.list_digests(lists)
    changed = start.compare_lists(begin, lists, digests)
    args.class_dim = args.class_dim or len(lists.classes)
    start.check_alike(vars(args), begin, digests)

    # What is trained.
    paddle = process.start_paddle(args.use_gpu, args.seed, args.deterministic)
    from losses.objective import Objective

    amp = process.amp_type(args.amp)
    network_settings = begin.settings.with_classes(args.class_dim)
    network = network_settings.build(args.dropout)
    prepare_network(network, begin, lists.classes, args.zero_init_residual, args.with_mem_opt, args.allow_partial)
    freezing = fill(optimizers.Freezing, args, freeze_head=not losses.trains_head(vars(args)))
    freezing.start(network, 0)
    options = {name: getattr(args, name) for name in losses.FLAGS}
    objective = Objective(fill(losses.LossSettings, args, options=options), args.class_dim, network.dimension)
    optimizer = optimizers.build_optimizer(fill(optimizers.OptimizerSettings, args), network, objective)
    scaler = paddle.amp.GradScaler(enable=amp == "float16", init_loss_scaling=2.0**14)
    average = Average(network, args.ema_decay) if args.ema_decay else None
    parts = Parts(network, objective, optimizer, scaler, average)
    signals = process.note_signals()

    # Where it is kept, and how far it is.
    run = Run(os.path.join(args.model_save_dir, args.model))
    same = parallel.from_first(parallel.is_first() and folder.prepare_run(run, begin, settings))
    progress = Progress(lists.steps)
    if begin.before:
        progress = start.restore(run, begin, lists, parts, same, changed)
        optimizers.report_rate(schedule, progress, begin.before)
    parallel.meet("the checkpoint")  # all have read it
    if parallel.is_first():
        folder.begin_run(run, begin, settings, progress, same)
    utility.print_arguments(vars(args), parser, f"{os.path.join(run.path, LOG_FILE)} has them")
    parallel.meet("the start")
    description = describe(vars(args), lists, digests, network_settings)
    run.log({"args": vars(args), "process": description["process"]})
    job = Job(run, lists, parts, settings, reading, batching, schedule, freezing, amp, signals, description)
    train(job, progress, bool(begin.before))


def describe(flags, lists, digests, settings):
    """What all checkpoints of a run say: its network, data, flags and process.

    Args:
        flags: {name: value}; lists: data.Data; digests: of data.list_digests; settings: models.Settings.
    """
    names = reader.read_class_names(flags["train_list"])
    return {
        "settings": dataclasses.asdict(settings),
        **digests,
        "digests": reader.DIGESTS,
        "labels": lists.classes.tolist(),
        "trained_labels": np.unique(lists.classes[lists.train.labels]).tolist(),
        "class_names": [names.get(label, str(label)) for label in lists.classes.tolist()] if names else None,
        "args": flags,
        "folder": os.getcwd(),  # that relative paths in the flags count from
        "process": process.describe_process(),
    }


# ---------------------------------------------------------------- what is trained


def prepare_network(network, begin, classes, zero_init_residual, with_mem_opt, allow_partial):
    """Gives an EmbeddingNet the weights that start.Start has; the head only where it is one of these classes, labels
    int64 [C], as far as that is known."""
    if zero_init_residual:
        network.backbone.zero_init_residual()
    if with_mem_opt:
        network.backbone.use_recompute()
    if begin.weights:
        head, found = "must" if begin.before else "fit", begin.weights
        labels = found.state["labels"] if found.state else None
        fits = weights.layer_size(found, "head") == network.head.weight.shape[1]
        if labels and fits and labels != classes.tolist():
            found = weights.without_head(found)
            print(f"note: the head of {found.file_name} is one of other classes: it starts anew")
        print(weights.load_weights(network, found, begin.settings.model, head, allow_partial))


# ---------------------------------------------------------------- training


def train(job, progress, continued):
    """What is left to do of the run."""
    begun, log = time.time(), RunLog(job.run, job.settings, job.signals)
    if continued and parallel.from_first(not job.run.has(dataclasses.asdict(progress))):
        save(job, progress)  # the run goes on in another folder, or with other steps
        if progress.best and parallel.is_first():
            record_recall(job, progress)
    if job.settings.eval_at_start and not continued:
        evaluate(job, -1, log)
    for epoch in range(progress.epoch, job.settings.num_epochs):
        progress = progress.at_epoch(epoch)
        if job.settings.is_done(progress):
            continue  # with the checkpoint that this run goes on from
        if progress.step < progress.steps:
            progress = train_epoch(job, progress, log)
            path = save(job, progress)  # before the evaluation, so that nothing that happens there can cost the epoch
            stop_if_told(job, progress, path)
        if not progress.evaluated and job.settings.is_due(epoch):
            progress = progress.with_recall(parallel.from_first(evaluate(job, epoch, log)))
            if parallel.is_first():
                record_recall(job, progress)
        best = progress.best
        found = f", best recall@1 {best['recall@1']:.4f} in pass {best['epoch']}" if best else ""
        print(f"saved {os.path.join(job.run.path, str(epoch))}{found}")
        if job.settings.is_over(progress):
            if epoch + 1 < job.settings.num_epochs:
                print(f"ended by --patience={job.settings.patience}: no better recall@1 since pass {best['epoch']}")
            break
    if parallel.is_first():
        print(summary(job.run, progress, job.data.val, time.time() - begun))
    print(f"done: {os.path.join(job.run.path, 'best' if progress.best else 'latest')}")


def train_epoch(job, progress, log):
    """The rest of an epoch; -> Progress at its end. Raises: Stopped after a signal, when the step is done and saved."""
    import paddle

    network, objective, optimizer, scaler, average = job.parts
    job.freezing.start(network, progress.epoch)
    objective.begin_epoch(progress.epoch)
    shared, owned = trained_parameters(network), trained_parameters(objective)
    statistics = network.batch_norm_statistics()
    epoch, steps = progress.epoch, progress.steps
    log.begin_epoch(progress)
    batches = data.training_batches(job.data, job.batching, job.reading, progress)
    for step in range(progress.step, steps):
        batch = log.next_batch(batches)

        # Rate and seeds. All draws depend on the step alone, so that a continued run repeats them: those of dropout in
        # each process, and those of mining in all alike.
        lr = optimizers.rate_of_step(job.schedule, epoch, step, steps)
        optimizer.set_lr(lr)
        seed = job.batching.seed + epoch * steps + step

        # Forward: the network over this process's share of the batch.
        paddle.seed((seed + 1_000_003 * (1 + parallel.rank())) % 2**31)
        with paddle.amp.auto_cast(enable=job.amp is not None, dtype=job.amp or "float16"):
            embedding, logits = network(process.to_device(batch.image))

        # Objective of the whole batch: from here on every process has all of it.
        label = parallel.gather(process.to_device(batch.label))
        embedding, logits = parallel.gather(embedding), parallel.gather(logits)
        paddle.seed(seed % 2**31)
        figures = objective(embedding, logits, label)

        # Gradients of all processes; and the running statistics, for each has normalised by its own pictures.
        scaler.scale(figures["loss"]).backward()
        parallel.sum_gradients(shared)
        parallel.average_gradients(owned)
        if shares_each_step(job):
            parallel.average(statistics)

        # Step. On the CPU what is not finite is seen before it reaches the weights; on a GPU reading it would stall
        # every step: there it stays in the weights, and is seen with the next line of the log and before a checkpoint.
        # The scaler sees an overflow of its own.
        progress = progress.at_step(step + 1, (*progress.bad, *batch.bad))
        due = what_is_due(job, progress)
        if due.look:
            gradients = [p.grad for p in shared + owned if p.grad is not None and not scaler.is_enable()]
            check_finite(job, progress, figures["loss"], gradients)
        scaler.step(optimizer)
        optimizers.update_scale(scaler)
        optimizers.clear_gradients(optimizer)
        if average:
            average.update(network, epoch * steps + step)

        log.add(len(label))
        if due.log:
            log.write(progress, lr, figures, logits, label, loss_scale(scaler))
        save_or_stop(job, progress, due, figures["loss"])
    log.end_epoch(epoch, job.data.train, progress.bad)
    return progress.at_step(steps)


# ---------------------------------------------------------------- evaluation


def evaluate(job, epoch, log):
    """Prints and logs recall@1,2,4,8 on the validation list; -> recall@1, or None on all ranks but 0.

    Raises: Stopped after a signal.
    """
    begun, val = time.time(), job.data.val
    network, average = job.parts.network, job.parts.average
    try:
        with average.in_place(network) if average else contextlib.nullcontext():
            found = extraction.extract(network, val, job.reading, job.settings.test_batch_size, signals=job.signals)
    except parallel.Signalled as error:
        raise stopped(error.number, job.run.newest()) from None
    if found is None:
        return None
    labels = val.labels[found.index]
    result = metrics.recall(found.features, labels, in_place=True)
    log.evaluation = seconds = time.time() - begun
    bad = reader.list_bad_images(val, found.bad)
    job.run.log({"epoch": epoch, "eval": result, "sec": seconds, **bad})
    recalls = ", ".join(f"recall@{k} {result[f'recall@{k}']:.4f}" for k in (1, 2, 4, 8))
    count, classes = len(labels), len(np.unique(labels))
    print(f"Pass {epoch}, {recalls}, {count} images of {classes} classes, time {seconds:.2f} sec")
    for remark in metrics.remarks(found.features, labels, result):
        print(f"note: {remark}")
    return result["recall@1"]


if __name__ == "__main__":
    process.run_script(main)
