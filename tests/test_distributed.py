"""Training in two processes over gloo gives the losses of one: DDP and FSDP2 around both kinds of layers."""

import socket
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import deq

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend"
)
STEPS, BATCH, WORLD = 4, 8, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, z, x):
        return torch.tanh(0.4 * self.norm(self.linear(z) + x))


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 12),
        deq.nn.Equilibrium(Block(), tol=1e-6),
        deq.nn.EquilibriumLinear(12, 10, "tanh", tol=1e-6),
        nn.Linear(10, 1),
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 5, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def worker(rank: int, port: int, kind: str, results) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
        net = make_net()
        if kind == "ddp":
            net = nn.parallel.DistributedDataParallel(net)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (WORLD,))
            for layer in net:
                fully_shard(layer, mesh=mesh)
            fully_shard(net, mesh=mesh)
        x, y = data()
        mine = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
        losses = torch.stack(train(net, x[mine], y[mine]))
        dist.all_reduce(losses)
        if rank == 0:
            results.put((losses / WORLD).tolist())
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put(traceback.format_exc())
        sys.exit(1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind):
    expected = train(make_net(), *data())
    context = mp.get_context("spawn")
    results = context.Queue()
    port = free_port()
    processes = [context.Process(target=worker, args=(rank, port, kind, results), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        losses = results.get(timeout=120)
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    assert isinstance(losses, list), losses
    assert losses[-1] < losses[0]
    torch.testing.assert_close(torch.tensor(losses), torch.stack(expected), rtol=1e-4, atol=1e-6)
