"""Batch norms over processes: two that share a batch unevenly equal one that has all of it, gradients and statistics, too."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from maskfirst.errors import UserError
from maskfirst.sync_norm import CPUSyncNorm, synchronise

CPU = torch.device("cpu")
SHARES = (slice(0, 3), slice(3, 4))
"""What each process has of four pictures; the last has one value a channel where maps have one pixel."""
MAKE: Mapping[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(3),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "not affine": lambda: nn.BatchNorm2d(3, affine=False),
    "not tracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "tokens": lambda: nn.BatchNorm1d(3),
    "one pixel": lambda: nn.BatchNorm2d(3),
    "32 bits": lambda: nn.BatchNorm2d(3),
    "16 bits": lambda: nn.BatchNorm2d(3),
}
KINDS = {"32 bits": torch.float32, "16 bits": torch.bfloat16}
"""Of the maps; float64 where they are not told."""


def network() -> nn.ModuleDict:
    random = torch.Generator().manual_seed(0)
    made = nn.ModuleDict(
        {name: make().to(torch.float32 if name in KINDS else torch.float64) for name, make in MAKE.items()}
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=random) + 0.5)
    return made


def learnt(norms: nn.ModuleDict, share: slice) -> dict[str, Tensor]:
    """All that two passes over a share of the pictures leave behind, by name; gradients are of a sum over the pictures."""
    random = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for name, norm in norms.items():
        shape = {"tokens": (4, 3, 7), "one pixel": (4, 3, 1, 1)}.get(name, (4, 3, 5, 6))
        for index in range(2):
            # The means are far from 0, where squares that are summed up would lose the variance.
            pictures = torch.randn(shape, generator=random, dtype=torch.float64) * 0.1 + 30
            direction = torch.randn(shape, generator=random)[share]
            own = pictures[share].to(KINDS.get(name, torch.float64)).requires_grad_()
            given = norm(own)
            (given * direction).sum().backward()
            found |= {f"{name} {index} given": given.detach(), f"{name} {index} gradient": own.grad}
    found |= {f"{name}.grad": parameter.grad for name, parameter in norms.named_parameters()}
    return found | norms.state_dict()


def process(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(SHARES))
    norms = network()
    synchronise(norms, CPU)
    torch.save(learnt(norms, SHARES[rank]), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    multiprocessing.start_processes(process, (str(tmp_path),), nprocs=len(SHARES), start_method="spawn")
    expected = learnt(network(), slice(None))
    apart = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SHARES))]
    assert set(apart[0]) == set(apart[1]) == set(expected)
    for name, value in expected.items():
        one, other = (each[name] for each in apart)
        if name.endswith(("given", "gradient")):
            found = torch.cat([one, other])
        elif name.endswith(".grad"):
            found = one + other
        else:
            assert torch.equal(one, other), name
            found = one
        # Means of 30 and spreads of 0.1 leave four digits of 32 bits.
        loose = {"rtol": 1e-3, "atol": 1e-3} if name.startswith("32 bits") else {}
        torch.testing.assert_close(found, value, msg=lambda m, n=name: f"{n}: {m}", **loose)


def test_names_parameters_and_buffers_stay_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), network(), nn.Sequential(nn.BatchNorm2d(3, eps=1e-3, momentum=0.3)))
    model[1].requires_grad_(False)
    model[2].eval()
    before = model.state_dict(keep_vars=True)
    synchronise(model, CPU)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    found = [module for module in model.modules() if isinstance(module, CPUSyncNorm)]
    assert len(found) == len(MAKE) + 1
    assert (found[-1].eps, found[-1].momentum) == (1e-3, 0.3)
    assert [module.training for module in found] == [True] * len(MAKE) + [False]
    again = list(model.modules())
    synchronise(model, CPU)
    assert list(model.modules()) == again


@pytest.mark.parametrize("training", [True, False])
def test_alone_they_are_torchs(training: bool) -> None:
    plain, synced = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    synchronise(synced, CPU)
    maps = torch.randn(2, 3, 4, 4)
    assert torch.equal(plain.train(training)(maps), synced.train(training)(maps))
    assert torch.equal(plain[0].running_var, synced[0].running_var)


def test_on_gpus_they_are_torchs_own() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    synchronise(model, torch.device("cuda"))
    assert type(model[0]) is nn.SyncBatchNorm


class Activated(nn.BatchNorm2d):
    """As timm has them, with an activation within."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_norms_of_another_class_are_refused() -> None:
    with pytest.raises(UserError, match=r"0\.1 is a Activated, .*; train in one process"):
        synchronise(nn.Sequential(nn.Sequential(nn.Identity(), Activated(3))), CPU)
