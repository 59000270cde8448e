"""The peer of recipes/cub200_proxyanchor.sh: PyTorch and pytorch-metric-learning train the same network on the same
pictures, as their users would. It only trains; eval.py measures what it wrote, as it does the recipes:

    make .venv-bench/installed
    .venv-bench/bin/python benchmarks/peer_cub200.py lists/CUB200_train.txt ResNet50_va.pdparams peer.safetensors \\
        --num_epochs=5 --seed=1
    python eval.py --model=ResNet50_va --pretrained_model=peer.safetensors --pooling=max --test_transform=resize \\
        --val_list=lists/CUB200_val.txt --image_shape=3,224,224

Margin loss (beta 1.2, margin 0.2; Wu et al., arXiv 1706.07567) on distance-weighted negatives beside a linear head with
label smoothing 0.1, both of max-pooled features; AdamW at 5e-5, the head's ten times that, weight decay 4e-4, a first
epoch of warm-up, then cosine; batch norm as it was. One process with all threads, channels_last.
"""

import argparse
import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_network(weights):
    """torchvision's ResNet50 with max pooling and no head, its strides moved to where ResNet50_va has them."""
    import torch
    from torchvision.models import resnet50

    from weights.formats import read_tensors

    network = resnet50()
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    network.avgpool, network.fc = torch.nn.AdaptiveMaxPool2d(1), torch.nn.Identity()
    tensors = {
        name.replace("_mean", "running_mean").replace("_variance", "running_var"): torch.tensor(array).float()
        for name, array in read_tensors(weights).items()
        if not name.startswith("fc.")
    }
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), (missing, unexpected)
    return network


def build_data(train_list, side, batch, seed):
    """A DataLoader of float batches [batch, 3, side, side] with four pictures of each class; the number of classes."""
    import torch
    from PIL import Image
    from pytorch_metric_learning.samplers import MPerClassSampler
    from torchvision import transforms

    folder = os.path.dirname(train_list)
    with open(train_list) as file:
        rows = [line.rsplit(" ", 1) for line in file.read().splitlines()]
    classes = sorted({int(label) for _, label in rows})
    labels = [classes.index(int(label)) for _, label in rows]
    transform = transforms.Compose([
        transforms.RandomResizedCrop(side, scale=(0.16, 1)), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            with Image.open(os.path.join(folder, rows[index][0])) as picture:
                return transform(picture.convert("RGB")), labels[index]

    sampler = MPerClassSampler(labels, m=4, batch_size=batch, length_before_new_iter=len(rows) // batch * batch)
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(Pictures(), batch, sampler=sampler, num_workers=2, generator=generator), len(
        classes
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_list")
    parser.add_argument("weights", help="ImageNet weights of ResNet50_va, as train.py --pretrained_model takes them")
    parser.add_argument("output", help="file for the trained weights, .safetensors")
    parser.add_argument("--num_epochs", type=int, default=6)
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--train_batch_size", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    import numpy as np
    import torch
    import torchvision_ops  # noqa: F401
    from pytorch_metric_learning.losses import MarginLoss
    from pytorch_metric_learning.miners import DistanceWeightedMiner
    from safetensors.torch import save_file

    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    batches, num_classes = build_data(args.train_list, args.side, args.train_batch_size, args.seed)
    network = build_network(args.weights).to(memory_format=torch.channels_last)
    head = torch.nn.Linear(2048, num_classes)
    mine, metric_loss = DistanceWeightedMiner(), MarginLoss(margin=0.2, beta=1.2)
    head_loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    network.train()
    for norm in norms:
        norm.eval().requires_grad_(False)
    groups = [
        {"params": [p for p in network.parameters() if p.requires_grad]},
        {"params": head.parameters(), "lr": 5e-4},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-5, weight_decay=4e-4)
    warmup, steps = len(batches), len(batches) * args.num_epochs

    def rate(step):
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    begun = time.perf_counter()
    for epoch in range(args.num_epochs):
        for step, (image, label) in enumerate(batches):
            embedding = network(image.to(memory_format=torch.channels_last))
            metric = metric_loss(embedding, label, mine(embedding, label))
            loss = metric + head_loss(head(embedding), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 0:
                done = epoch * len(batches) + step + 1
                speed = done * args.train_batch_size / (time.perf_counter() - begun)
                print(f"epoch {epoch}, batch {step}, loss {loss.item():.4f}, {speed:.1f} img/s", flush=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, args.output)
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
