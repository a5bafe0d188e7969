"""Cost: parameters, multiply-adds and training memory of a model, from the operators that run, without computing them.

Multiply-adds follow fvcore's convention, in which the papers' "GFLOPs" are given. 1 for each multiply-accumulate of a
convolution or a matrix product (attention, fused or not, being two); 5 an element for an affine layer norm, 2 for an
affine batch norm; 4 an output element for bilinear resizing; nothing for softmax, activations, sums, elementwise
products and bicubic resizing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from maskfirst import recipe as recipes
from maskfirst.build import Experiment
from maskfirst.contracts import Criterion
from maskfirst.criteria.matched import Matched
from maskfirst.frames import Frame, Size
from maskfirst.proposers.atm import ATM, ShrunkATM, SingleATM
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch, Names, Proposals, Segments

READ_OUT = "read_out"
"""Stands for the mixing of masks by their names among the operators and modules of a Cost."""


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes. `activations`, a picture: what is kept for the backward pass; the rest once.

    `optimizer`: AdamW's two moments. The peak is somewhat higher: gradients of activations and workspaces come and go.
    """

    activations: int
    parameters: int
    gradients: int
    optimizer: int

    def total(self, pictures: int) -> int:
        """For `pictures` at once."""
        return pictures * self.activations + self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Cost:
    """What a model costs for one picture of `size` px, read-out included.

    `parameters_by_part` tells backbones from the part that they serve; its sum is `parameters`. `multiply_adds` is the sum
    of `by_operator`. `by_module`: every module's with all inside it, by dotted name, where it is not nothing; an operator
    belongs to the innermost module whose call it is part of.
    """

    size: Size
    parameters: int
    parameters_by_part: Mapping[str, int]
    multiply_adds: int
    by_operator: Mapping[str, int]
    by_module: Mapping[str, int]
    memory: Memory


@dataclass(frozen=True)
class Published:
    """What others have reported for the model of a recipe: its section `published`.

    `scores` in percent, those with test-time augmentation as `..._tta`. `source`: where the `checkpoint` lies, the file that
    was released; None: the scores alone were. Of two stages `checkpoint` is the files of both, and `source` where the second
    lies; the first is that of a recipe of its own. `parameters`: of the original code's model. `gflops`: 1e9
    multiply-accumulates.
    """

    dataset: str
    scores: dict[str, float]
    source: str
    checkpoint: str | tuple[str, str] | None = None
    parameters: int | None = None
    gflops: float | None = None


@dataclass(frozen=True)
class Measured:
    """What we have measured with a recipe, and how: its section `measured`. `scores` in percent."""

    dataset: str
    scores: dict[str, float]
    hardware: str
    minutes: float
    command: str


@dataclass(frozen=True)
class Row:
    """A bundled recipe with the original's figures and ours."""

    name: str
    published: Published | None
    measured: Measured | None


@dataclass(frozen=True)
class Counted:
    """What a recipe's model has and does, by the operators that run. `gflops`: 1e9 multiply-adds of one picture of `size` px.

    Both are None for a network that is made for no size in particular.
    """

    parameters: int
    size: Size | None
    gflops: float | None


def row(name: str) -> Row:
    """What a bundled recipe says of itself."""
    said = recipes.own(name)
    return Row(name, figures(said, "published", Published), figures(said, "measured", Measured))


def counted(name: str) -> Counted:
    """Of a bundled recipe; takes seconds for the largest."""
    experiment = Experiment(recipes.load(name))
    segmenter, size = experiment.segmenter(meta=True), experiment.size
    gflops = None if size is None else multiply_adds(segmenter, size)[0].total() / 1e9
    return Counted(sum(parameters_by_part(segmenter).values()), size, gflops)


def figures(recipe: recipes.Recipe, key: str, kind: type) -> Any:
    """The section `key` of a recipe as a `kind`, Published or Measured; None where there is none. Raises RecipeError."""
    node = recipe.tree.get(key)
    return None if node is None else recipes.construct(node, kind, menus={}, where=key, source=recipe.source)


def cost(segmenter: Segmenter, size: Size, present: int = 10) -> Cost:
    """The cost of one picture of `size` px, its whole canvas at once. Takes seconds and no memory for the largest models.

    `present`: classes in the picture that training memory is told for. Neither weights nor mode of `segmenter` are changed,
    and it may lie on any device, "meta" too.
    """
    operators, modules = multiply_adds(segmenter, size)
    parts = parameters_by_part(segmenter)
    memory = training_memory(segmenter, size, present)
    return Cost(size, sum(parts.values()), parts, operators.total(), operators, modules, memory)


def parameters_by_part(segmenter: Segmenter) -> dict[str, int]:
    """Parameters of the proposer, the namer and so on, those of a part's `backbone` or `trunk` told apart.

    So is the `synthesis` of namer pading, which only its training needs.
    """
    parts: Counter[str] = Counter()
    for name, parameter in segmenter.named_parameters():
        part, _, rest = name.partition(".")
        inner = rest.partition(".")[0]
        parts[f"{part}.{inner}" if inner in ("backbone", "trunk", "synthesis") else part] += parameter.numel()
    return dict(parts)


def multiply_adds(segmenter: Segmenter, size: Size) -> tuple[Counter[str], Counter[str]]:
    """Multiply-adds of one picture in evaluation, by operator and by module.

    The network is counted by the operators that run, the read-out by its shapes, whatever the runs of rows it is made in.
    Three things are counted although prediction skips them, because the published figures hold them: names for earlier
    guesses, and resizes of masks and scores that change nothing.
    """
    fakes = _Fakes(segmenter)
    batch = fakes.batch(size, 1)
    with _mode(segmenter, training=False), torch.no_grad(), _Count(segmenter) as count:
        proposals, names = fakes.call(_AllNamed(segmenter), batch)
    count.note("bilinear", "proposer", 4 * _unmoved(segmenter, proposals))
    pixels, classes = prod(size), names.logits.shape[-1] - 1
    if proposals.names is names and proposals.competing:
        count.note("bilinear", READ_OUT, 4 * classes * pixels)
    else:
        queries, places = proposals.masks.shape[1], prod(proposals.resolution or size)
        count.note("bilinear", READ_OUT, 4 * (queries * places + classes * pixels))
        count.note(READ_OUT, READ_OUT, _einsum(queries * classes * places))
    return count.operators, count.modules


def training_memory(segmenter: Segmenter, size: Size, present: int = 10) -> Memory:
    """Bytes that training with AdamW in fp32 takes, for a picture of `size` px in which `present` classes occur.

    Method: forward and losses run on tensors without data, and every storage that autograd keeps for the backward pass is
    counted once, parameters aside. Kernels are chosen as on the CPU, where attention with dropout keeps its
    probabilities; a GPU's fused attention keeps less.
    """
    parameters = {name: parameter.nbytes for name, parameter in segmenter.named_parameters()}
    trained = sum(parameters[name] for name, parameter in segmenter.named_parameters() if parameter.requires_grad)
    fakes = _Fakes(segmenter)
    batch = fakes.batch(size, min(present, len(segmenter.vocabulary)))
    with _mode(segmenter, training=True), _matched_in_order(segmenter.criterion), torch.enable_grad():
        kept = saved_bytes(lambda: fakes.call(_Losses(segmenter), batch), fakes.tensors.values())
    return Memory(kept, sum(parameters.values()), trained, 2 * trained)


def saved_bytes(run: Callable[[], object], aside: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps while `run` runs, each counted once and those of `aside` not at all."""
    skipped = {tensor.untyped_storage()._cdata for tensor in aside}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Holding the storage keeps its address from being given to another.
        kept[storage._cdata] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in skipped)


def _unmoved(segmenter: Segmenter, proposals: Proposals) -> int:
    """Elements of ATM's masks that the original resizes to the grid they have: once a stage. Ours leaves them be."""
    proposer = segmenter.proposer
    if isinstance(proposer, ATM):
        return len(proposer.decoders) * proposals.masks[0].numel()
    return proposals.masks[0].numel() if isinstance(proposer, SingleATM | ShrunkATM) else 0


class _AllNamed(nn.Module):
    """Proposals and their names, with names made and dropped for the earlier guesses."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: Batch) -> tuple[Proposals, Names]:
        proposals, names = self.segmenter(batch)
        for guess in proposals.earlier:
            self.segmenter.namer(guess, batch)
        return proposals, names


class _Losses(nn.Module):
    """The training loss as a forward, for `functional_call`."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: Batch) -> Tensor:
        if self.segmenter.criterion is None:
            # Losses of a phase are few numbers beside what the network keeps.
            return self.segmenter(batch)[1].logits.sum()
        return torch.stack(list(self.segmenter.losses(batch).values())).sum()


class _Fakes:
    """Tensors with shape, type and device but without data, standing for a model's own and for its input."""

    def __init__(self, segmenter: Segmenter) -> None:
        # What steers the loss (which classes occur) stays real, beside data that is not there.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.proposer = segmenter.proposer
        with self.mode:
            self.tensors = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
                for name, tensor in (*segmenter.named_parameters(), *segmenter.named_buffers())
            }

    def batch(self, size: Size, present: int) -> Batch:
        """One picture with a truth of `present` segments."""
        with self.mode:
            pixels = torch.empty(1, 3, *size)
            masks = torch.empty(present, *size, dtype=torch.bool)
        crowd = torch.zeros(present, dtype=torch.bool)
        truth = Segments(masks, torch.arange(present), torch.ones(present), crowd)
        task = "semantic" if "semantic" in self.proposer.tasks else min(self.proposer.tasks)
        return Batch(pixels, (task,), (Frame(size, size, size),), ("",), (truth,))

    def call(self, module: nn.Module, batch: Batch) -> Any:
        """`module(batch)`, a module around the segmenter, with the segmenter's tensors replaced."""
        tensors = {f"segmenter.{name}": tensor for name, tensor in self.tensors.items()}
        return functional_call(module, tensors, (batch,))


@contextmanager
def _matched_in_order(criterion: Criterion | None) -> Iterator[None]:
    """The n-th proposal matched to the n-th segment inside the block, as costs without data cannot be compared."""
    if not isinstance(criterion, Matched):
        yield
        return
    before = criterion.assign
    criterion.assign = lambda costs: (torch.arange(min(costs.shape)), torch.arange(min(costs.shape)))
    try:
        yield
    finally:
        criterion.assign = before


@contextmanager
def _mode(segmenter: Segmenter, training: bool) -> Iterator[None]:
    """Training or evaluation inside the block; every module's own mode again after it."""
    before = {module: module.training for module in segmenter.modules()}
    segmenter.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _shape(tensor: Tensor) -> int:
    return prod(tensor.shape)


def _product(left: Tensor, right: Tensor) -> int:
    return left.numel() * right.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return pairs * (query.shape[-1] + value.shape[-1])


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    pixels, weight, transposed = args[0], args[1], args[6]
    places = (pixels if transposed else out).shape[2:].numel()
    return out.shape[0] * weight.numel() * places


aten = torch.ops.aten
RULES: Mapping[Any, tuple[str, Callable[[tuple[Any, ...], Any], int]]] = {
    aten.convolution: ("convolution", _convolution),
    aten.mm: ("linear", lambda args, out: _product(args[0], args[1])),
    aten.addmm: ("linear", lambda args, out: _product(args[1], args[2])),
    aten.bmm: ("attention", lambda args, out: _product(args[0], args[1])),
    aten.baddbmm: ("attention", lambda args, out: _product(args[1], args[2])),
    aten._scaled_dot_product_flash_attention_for_cpu: ("attention", lambda args, out: _attention(*args[:3])),
    aten.native_layer_norm: ("layer norm", lambda args, out: (4 if args[2] is None else 5) * out[0].numel()),
    aten.native_batch_norm: ("batch norm", lambda args, out: (1 if args[1] is None else 2) * out[0].numel()),
    aten._native_batch_norm_legit_no_training: (
        "batch norm",
        lambda args, out: (1 if args[1] is None else 2) * out[0].numel(),
    ),
    aten.upsample_bilinear2d: ("bilinear", lambda args, out: 4 * out.numel()),
}
"""Operator -> what it is called here, and its multiply-adds from its arguments and result."""


def _einsum(products: int) -> int:
    """As the convention counts a mixing of Q masks into K names: two FLOPs a product, to the 4 digits numpy prints."""
    return int(float(f"{2 * products:.3e}") / 2)


class _Count(TorchDispatchMode):
    """Counts the multiply-adds of all that runs inside, by operator and by module."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.modules: Counter[str] = Counter()
        self._calls: list[str] = []
        self._hooks: list[Any] = []
        self._names = {module: name for name, module in segmenter.named_modules()}

    def __enter__(self) -> "_Count":
        def enter(module: nn.Module, args: Any) -> None:
            self._calls.append(self._names[module])

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._calls.pop()

        for module in self._names:
            self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def note(self, operator: str, module: str, amount: int) -> None:
        """Counts `amount` for an operator, its module and all modules around that."""
        self.operators[operator] += amount
        while module and amount:
            self.modules[module] += amount
            module = module.rpartition(".")[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            self.note(rule[0], self._calls[-1], rule[1](args, out))
        return out
