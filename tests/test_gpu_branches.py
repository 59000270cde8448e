"""Every line that only a GPU runs, on a stand-in for one: see stand_in_gpu.py."""

import json
import os
import signal

import numpy as np
import paddle
import pytest
from conftest import ROOT, TINY, run

import eval as eval_script
import infer
import train
import weights
from losses import LOSSES
from retrieval import engine
from retrieval.engine import EngineOptions
from runtime import parallel, process
from training.log import RunLog
from utility import UserError

ON_GPU = [flag for flag in TINY if flag not in ("--use_gpu=False", "--log_every=1")]
# 11 steps of which the first, the sixth and the last have a line of the log.
SHORT = [*ON_GPU, "--log_every=5", "--num_epochs=1", "--total_images=88", "--eval_every=0"]


def log_of(folder):
    with open(folder / "ResNet8" / "train_log.jsonl") as file:
        return [json.loads(line) for line in file]


def steps_of(folder):
    """The log's lines of steps, without what depends on the clock."""
    clock = ("sec", "img_per_sec", "data_wait", "peak_memory")
    return [{k: v for k, v in line.items() if k not in clock} for line in log_of(folder) if "step" in line]


# ---------------------------------------------------------------- training


def watch(gpu):
    """Has the notes say where a step looks at what the device has computed, and where its line is logged."""
    check, write = train.check_finite, RunLog.write

    def look(*args):
        gpu.notes.append(("look",))
        check(*args)

    def logged(*args):
        write(*args)
        gpu.notes.append(("logged",))

    gpu.set(train, "check_finite", look)
    gpu.set(RunLog, "write", logged)


def waits(gpu):
    """The notes, of reads and of copies from pageable memory, between a line of the log and the next look."""
    ends = [place for place, note in enumerate(gpu.notes) if note[0] in ("look", "logged")][1:-1]
    assert [gpu.notes[place][0] for place in ends] == ["logged", "look"] * (len(ends) // 2) and len(ends) == 4
    return [
        note
        for begin, end in zip(ends[::2], ends[1::2])
        for note in gpu.notes[begin:end]
        if note[0] in ("read", "pageable")
    ]


WAYS = [
    *([f"--loss_name={name}"] for name in LOSSES),
    *([f"--triplet_mining={mining}"] for mining in ("semihard", "hard", "distance")),
    *([f"--optimizer={name}"] for name in ("sgd", "adam", "adamw")),
    ["--loss_name=multisimilarityloss", "--memory_size=12", "--clip_value=1", "--pooling=max"],
    ["--amp=bfloat16", "--ema_decay=0.9", "--clip_norm=1", "--pooling=gem", "--embedding_size=8"],
    ["--amp=bfloat16", "--freeze_bn=True", "--with_mem_opt=True", "--head=cosine", "--pooling=avg+max"],
    ["--embedding_norm=layer", "--freeze_stages=1", "--warmup_head_epochs=1", "--label_smoothing=0.1"],
]


@pytest.mark.parametrize("more", WAYS, ids=" ".join)
def test_no_step_waits_between_log_lines(gpu, birds, tmp_path, more):
    watch(gpu)
    gpu.call(train, *birds.lists, *SHORT, f"--model_save_dir={tmp_path}", *more)
    assert waits(gpu) == []
    assert {note[1][0] for note in gpu.notes if note[0] == "pinned"} == {8}  # pictures and labels
    assert [line["step"] for line in steps_of(tmp_path)] == [0, 5, 10]


def test_a_read_in_the_loop_is_seen(gpu, birds, tmp_path):
    watch(gpu)
    total = parallel.sum_gradients
    gpu.set(parallel, "sum_gradients", lambda parameters: (total(parameters), parameters[0].grad.sum().item()))
    gpu.call(train, *birds.lists, *SHORT, f"--model_save_dir={tmp_path}")
    assert [note[1] for note in waits(gpu)] == ["item"] * 10  # of the steps but for the first


def test_float16_waits_in_the_optimizer_alone(gpu, birds, tmp_path):
    watch(gpu)
    gpu.call(train, *birds.lists, *SHORT, "--amp=float16", f"--model_save_dir={tmp_path}")
    assert {os.path.basename(os.path.dirname(note[2].split(":")[0])) for note in waits(gpu)} <= {"optimizer", "amp"}
    assert len(waits(gpu)) <= 10
    assert [line["loss_scale"] for line in steps_of(tmp_path)] == [2.0**14] * 3


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
def test_training_as_on_the_cpu_and_going_on_to_the_bit(gpu, birds, tmp_path, amp, capsys):
    flags = [*birds.lists, *ON_GPU, f"--amp={amp}", "--eval_every=2", "--num_epochs=2", "--deterministic=True"]
    flags.append("--lr_strategy=constant")
    gpu.call(train, *flags, f"--model_save_dir={tmp_path}/whole")
    assert gpu.flags == {"FLAGS_cudnn_deterministic": True, "FLAGS_cudnn_exhaustive_search": False}
    gpu.call(train, *flags, f"--model_save_dir={tmp_path}/parts", "--num_epochs=1")
    gpu.name = "NVIDIA Another"
    capsys.readouterr()
    gpu.call(train, *flags, f"--model_save_dir={tmp_path}/parts", "--checkpoint=latest")
    assert "last digits from one in one go: gpu NVIDIA Another (was NVIDIA Stand-in)" in capsys.readouterr().out
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    found = log_of(tmp_path / "whole")[0]["process"]
    assert found["device"] == "gpu:0" and found["gpu"] == "NVIDIA Stand-in" and found["cudnn"] == 8900
    if amp == "off":
        process.start_paddle(use_gpu=False)
        gpu.call(train, *flags, "--use_gpu=False", f"--model_save_dir={tmp_path}/cpu", "--log_every=10")
        assert_same_files(tmp_path / "whole", tmp_path / "cpu", exactly=False)


def assert_same_files(one, other, exactly=True, names=("model.pdparams", "model.pdopt")):
    for name in names:
        here, there = (weights.read_pickle(str(folder / "ResNet8" / "1" / name)) for folder in (one, other))
        assert list(here) == list(there)
        for key in here:
            if exactly:
                assert here[key].tobytes() == there[key].tobytes(), key
            else:
                np.testing.assert_allclose(here[key], there[key], rtol=1e-4, atol=1e-6, err_msg=key)


def spoil_gradients(gpu, value, step, then=lambda: None):
    """Fills the gradients of each step from `step` on, and calls `then` in it."""
    calls = []

    def spoil(parameters):
        calls.append(1)
        if len(calls) > step:
            for parameter in parameters:
                parameter.grad.set_value(paddle.full_like(parameter.grad, value))
        if len(calls) == step + 1:
            then()

    gpu.set(parallel, "sum_gradients", spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_with_the_next_line(gpu, birds, tmp_path, value):
    spoil_gradients(gpu, value, 2)
    with pytest.raises(UserError, match=r"NaN or infinite in pass 0, trainbatch 5; last good checkpoint: none yet"):
        gpu.call(train, *birds.lists, *SHORT, f"--model_save_dir={tmp_path}")
    assert [line["step"] for line in steps_of(tmp_path)] == [0]


def test_what_is_not_finite_is_seen_before_a_signal_saves_it(gpu, birds, tmp_path):
    spoil_gradients(gpu, float("nan"), 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match=r"in pass 0, trainbatch 2; last good checkpoint: none yet"):
        gpu.call(train, *birds.lists, *SHORT, f"--model_save_dir={tmp_path}")
    assert not (tmp_path / "ResNet8" / "latest").exists()


def test_a_signal_between_log_lines_saves(gpu, birds, tmp_path):
    spoil_gradients(gpu, 0.0, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(process.Stopped, match=r"ResNet8/0_3; --checkpoint=latest goes on from there"):
        gpu.call(train, *birds.lists, *SHORT, f"--model_save_dir={tmp_path}")


def test_a_loss_scale_that_collapses_ends_the_run(gpu, birds, tmp_path):
    spoil_gradients(gpu, float("inf"), 0)
    with pytest.raises(UserError) as error:
        gpu.call(train, *birds.lists, *SHORT, "--total_images=800", "--amp=float16", f"--model_save_dir={tmp_path}")
    assert str(error.value).startswith("the loss scale of --amp=float16 fell to 0.") and "\n" not in str(error.value)
    scales = [line["loss_scale"] for line in steps_of(tmp_path)]
    assert scales == sorted(scales, reverse=True) and scales[0] == 2.0**13 and 1 <= scales[-1] < 100


def test_a_backbone_that_rests_stays_as_it_is(gpu, birds, tmp_path):
    """Weight decay included: on the CPU, too."""
    for flag in ("--use_gpu=True", "--use_gpu=False"):
        flags = [*SHORT, flag, "--weight_decay=0.1", "--overwrite=True", f"--model_save_dir={tmp_path}"]
        gpu.call(train, *birds.lists, *flags, "--warmup_head_epochs=1", "--eval_at_start=True")
        paddle.seed(3)
        found = weights.read_pickle(str(tmp_path / "ResNet8" / "0" / "model.pdparams"))
        gpu.call(train, *birds.lists, *flags, "--lr=0", "--freeze_bn=True")
        before = weights.read_pickle(str(tmp_path / "ResNet8" / "0" / "model.pdparams"))
        changed = {name for name in found if found[name].tobytes() != before[name].tobytes()}
        assert changed == {"head.weight", "head.bias"}


# ---------------------------------------------------------------- evaluation and features


def images_of(gpu):
    """Pictures of each batch that was handed to the device."""
    return [note[1][0] for note in gpu.notes if note[0] == "pinned"]


@pytest.mark.parametrize(("precision", "near"), [("float32", 1e-5), ("float16", 2e-3), ("bf16", 2e-2)])
def test_features_as_on_the_cpu(gpu, birds, trained, tmp_path, precision, near):
    best = f"--pretrained_model={trained}/ResNet8/best"
    common = [best, "--input", birds.val_list, "--batch_size=20", f"--precision={precision}"]
    gpu.call(infer, *common, f"--feature_file={tmp_path}/gpu.npz")
    assert images_of(gpu) == [20, 20, 20]  # of 48: the last one is filled up
    kinds = [note[0] for note in gpu.notes if note[0] in ("pinned", "waited")]
    assert kinds == ["pinned", "pinned", "waited", "pinned", "waited", "waited"]
    readers = {
        note[2].split(":")[0] for note in gpu.notes[gpu.notes.index(("pinned", (20, 32, 32, 3))) :] if note[0] == "read"
    }
    assert readers == {os.path.join(ROOT, "retrieval", "extraction.py")}
    run("infer.py", best, "--input", birds.val_list, "--use_gpu=False", f"--feature_file={tmp_path}/cpu.npz")
    found, wanted = (np.load(tmp_path / f"{name}.npz") for name in ("gpu", "cpu"))
    assert found["features"].dtype == np.float32 and found["paths"].tolist() == wanted["paths"].tolist()
    error = np.linalg.norm(found["features"] - wanted["features"]) / np.linalg.norm(wanted["features"])
    assert error < near and (precision == "float32" or error > near / 100)


def test_figures_as_on_the_cpu(gpu, birds, trained, tmp_path, capsys):
    common = [f"--pretrained_model={trained}/ResNet8/best", f"--gallery_list={birds.val_list}"]
    gpu.call(eval_script, *common, f"--output_json={tmp_path}/gpu.json")
    assert images_of(gpu) == [48, 48] and not [note for note in gpu.notes if note[0] == "fetched" and len(note[1]) != 2]
    run("eval.py", *common, "--use_gpu=False", f"--output_json={tmp_path}/cpu.json")
    found, wanted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("gpu", "cpu"))
    assert all(abs(found[name] - wanted[name]) < 1e-6 for name in ("recall@1", "recall@8", "MAP@R"))


def test_only_what_is_asked_for_comes_back(gpu, birds, trained, tmp_path):
    common = [f"--pretrained_model={trained}/ResNet8/best", f"--feature_file={tmp_path}/f.npz", "--batch_size=48"]
    fetched = {}
    for more in ([], ["--quiet"]):  # logits are printed, or not
        gpu.notes.clear()
        gpu.call(infer, *common, "--input", birds.val_list, *more)
        fetched[" ".join(more)] = [note[1][1] for note in gpu.notes if note[0] == "fetched"]
    assert fetched == {"": [64, 6], "--quiet": [64]}


def test_a_precision_that_the_gpu_lacks_and_one_that_is_not_for_the_cpu(gpu, capsys):
    network = paddle.nn.Identity()
    gpu.set_device("gpu")
    gpu.set(paddle.amp, "is_bfloat16_supported", lambda: False)
    for engine_flag in ("auto", "eager"):
        run_it = engine.prepare(network, EngineOptions(engine_flag, "bf16"), [3, 8, 8], 1)
        assert run_it.precision == "float32"
        note = "note: --precision=bf16, but this GPU can't compute in bfloat16: running in float32\n"
        assert capsys.readouterr().err == note
    gpu.set_device("cpu")
    assert engine.prepare(network, EngineOptions("auto", "float16"), [3, 8, 8], 1) is network
    assert capsys.readouterr().err == "note: --precision=float16, but that is for a GPU: running in float32\n"


def test_an_export_is_made_on_the_cpu(gpu, trained, tmp_path, capsys):
    moves = []
    gpu.set(paddle.nn.Layer, "to", lambda layer, device: moves.append(device))
    gpu.call(infer, f"--pretrained_model={trained}/ResNet8/best", f"--export_dir={tmp_path}/e")
    assert moves == ["cpu", "gpu:0"] and "wrote the model to" in capsys.readouterr().out
    assert gpu.device == "gpu:0"


# ---------------------------------------------------------------- two processes


def test_two_processes_as_on_the_cpu(birds, tmp_path):
    """The running statistics come together before a checkpoint rather than in each step: the same but for rounding."""
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node=2"]
    flags = [*birds.lists, *ON_GPU, "--num_epochs=2", "--log_every=4", "--eval_every=2"]
    for name, script in (("gpu", ["tests/programs/stand_in_train.py"]), ("cpu", ["train.py", "--use_gpu=False"])):
        run(*launcher, f"--log_dir={tmp_path}/log_{name}", *script, *flags, f"--model_save_dir={tmp_path}/{name}")
    process_of = [log_of(tmp_path / name)[0]["process"] for name in ("gpu", "cpu")]
    assert [found["processes"] for found in process_of] == [2, 2] and process_of[0]["device"] == "gpu:0"
    assert_same_files(tmp_path / "gpu", tmp_path / "cpu", exactly=False)
