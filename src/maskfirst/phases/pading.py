"""The phase of PADing: made queries of unseen names teach a classifier, their maker and it learning in turns, all else at rest.

He, Ding & Jiang, "Primitive Generation and Semantic-related Alignment for Universal Zero-Shot Segmentation", CVPR 2023.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maskfirst import tasks
from maskfirst.contracts import Phase, Turns
from maskfirst.criteria.alignment import SIMILARITIES, alignment, discrepancy, divergence
from maskfirst.criteria.matched import UNKNOWN, Matched
from maskfirst.errors import UserError, listed
from maskfirst.namers.pading import PADing, SynthesisBranch
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.optim import Optimizer, parameter_groups
from maskfirst.phase import Trained
from maskfirst.phases.kept import Kept, digest
from maskfirst.segmenter import Segmenter
from maskfirst.training import Training
from maskfirst.types import Batch, Segments

SLICE = 156
"""Logits that the published class term looks at, whatever the names: the seen ones of COCO-Stuff."""
Kind = Literal["discrepancy", "name", "align", "unrelated", "relation", "rebuild"]


@dataclass(frozen=True)
class Deviations:
    """Where the published code goes another way than its paper says or than one would expect, each as `compatible`.

    `columns`: the class term is a cross-entropy over "all" logits, or "compatible" over the first 156 whatever the names.
    `targets`: similarities of projected class vectors are goals alone, "detached", or "compatible" are drawn to the features,
    too. `relations`: the relation's cross-entropy is given its "logits", or "compatible" their sigmoids.
    """

    columns: Literal["all", "compatible"] = "compatible"
    targets: Literal["detached", "compatible"] = "compatible"
    relations: Literal["logits", "compatible"] = "compatible"


@dataclass(frozen=True)
class LossWeights:
    """What multiplies each loss of the generator. `structure` multiplies all but the first two, besides."""

    discrepancy: float = 1.0
    name: float = 0.001
    structure: float = 1e-4
    align: float = 1.0
    unrelated: float = 0.5
    relation: float = 0.2
    rebuild: float = 0.5

    def of(self, kind: Kind) -> float:
        """Of one term; the terms of a kind share its weight out."""
        if kind in ("discrepancy", "name"):
            return getattr(self, kind)
        return self.structure * getattr(self, kind) / (3 if kind == "align" else 2)


Seen = tuple[Float[Tensor, "B Q D"], Int64[Tensor, "B Q"]]
"""Queries, and what the criterion calls each."""


class Found(NamedTuple):
    """What the frozen network makes of a batch: the queries, what the criterion calls each, and which are matched."""

    queries: Float[Tensor, "R D"]
    named: Int64[Tensor, " R"]
    matched: Int64[Tensor, " N"]


class PADingPhase(Phase):
    """Two turns: the generator's losses, and the classifier's on real queries and some that the generator has made since.

    Queries are matched by the criterion, which must be `set`, with the names of the first stage's head. Its points, weights and
    costs count; its losses are not asked for.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        settings: Training,
        fakes: int = 5,
        unseen_weight: float = 5.0,
        no_object: float = 0.1,
        classifier_lr: float = 0.001,
        classifier_momentum: float = 0.9,
        classifier_decay: float = 0.0005,
        table: Literal["all", "seen"] = "all",
        similarity: Literal["cosine", "euclidean", "dot", "scaled"] = "cosine",
        losses: LossWeights = LossWeights(),
        deviations: Deviations = Deviations(),
        cache: str | None = None,
    ) -> None:
        """`settings`: the optimizer and the schedule are the generator's. The classifier's is SGD, whose rate stays as it is.

        `fakes`: unseen names a step of which the classifier is given one made query each, other ones at every step.
        `unseen_weight`, `no_object`: weights in the classifier's cross-entropy, where seen names have 1. `table`: the names
        among which a made query of a seen one is to be told by its relation. `similarity`: of features, and of classes.
        `cache`: a folder for what the frozen network makes of each picture, 4 Q D bytes, so that it makes it once. That
        pays where pictures come again as they were, without random augmentation. The points by which queries are matched are
        a picture's own then, the same whenever it comes. Raises UserError where something else is to be trained.
        """
        namer, criterion = segmenter.namer, segmenter.criterion
        if not isinstance(namer, PADing):
            raise UserError(f"phase pading trains namer pading, and this is {namer.example['kind']}; take namer pading")
        if namer.synthesis is None:
            raise UserError("phase pading needs what makes queries; say namer.synthesis, and the unseen names")
        if not isinstance(criterion, Matched):
            raise UserError("phase pading matches by criterion set; say criterion: {kind: set}")
        if fakes < 1:
            raise UserError(f"fakes: {fakes} must be at least 1, as made queries a step; 5 is usual")
        learning = [name for name, value in segmenter.proposer.named_parameters() if value.requires_grad]
        if learning:
            raise UserError(
                f"phase pading trains the namer alone, and the proposer has {len(learning)} trainable parameters "
                f"({listed(learning, 3)}); set proposer.freeze to true"
            )
        _check_vectors(namer.synthesis, segmenter)
        self.segmenter, self.namer, self.synthesis, self.criterion = segmenter, namer, namer.synthesis, criterion
        self.fakes, self.table, self.losses, self.deviations = fakes, table, losses, deviations
        self.kept = None if cache is None else Kept(cache)
        self._about: str | None = None
        self.similarity = SIMILARITIES[similarity]
        self.class_weights = torch.ones(len(segmenter.vocabulary) + 1)
        self.class_weights[list(self.synthesis.unseen)] = unseen_weight
        self.class_weights[-1] = no_object
        self.shuffle: Callable[[int], Tensor] = torch.randperm
        """Of the unseen names; may be exchanged, to replay what was recorded."""
        made_by = dict(self.synthesis.named_parameters(prefix="namer.synthesis"))
        groups = parameter_groups(made_by, settings.optimizer, settings.groups)
        classifier = Optimizer("sgd", classifier_lr, classifier_decay, momentum=classifier_momentum)
        linear = parameter_groups(dict(namer.linear.named_parameters(prefix="namer.linear")), classifier, ())
        self.modules = {"generator": Trained(self.synthesis), "classifier": Trained(namer.linear)}
        self.optimizers = {"generator": settings.optimizer.build(groups), "classifier": classifier.build(linear)}
        self.unscheduled = frozenset({"classifier"})

    def turns(self, batch: Batch) -> Turns:
        # Looked at inside of the first turn, where mixed precision holds, and for both.
        seen: list[Found] = []

        def generate() -> dict[str, Tensor]:
            seen.append(self.look(batch))
            return self.generator_losses(seen[0])

        yield self.modules["generator"](generate)
        yield self.modules["classifier"](lambda: {"classifier": self.classifier_loss(seen[0])})

    @torch.no_grad()
    def look(self, batch: Batch) -> Found:
        """Runs the frozen network as in evaluation, and matches. Raises UserError where the truth has an unseen name."""
        if batch.truth is None:
            raise ValueError("phase pading needs a batch with truth")
        truth = [
            tasks.targets(segments, self.segmenter.vocabulary, task)
            for segments, task in zip(batch.truth, batch.tasks, strict=True)
        ]
        self._check_labels(truth, batch.keys)
        queries, named = self._seen(batch, truth) if self.kept is None else self._kept(self.kept, batch, truth)
        named = named.flatten()
        matched = (named != UNKNOWN) & (named < len(self.segmenter.vocabulary))
        return Found(queries.flatten(0, 1), named, matched.nonzero()[:, 0])

    def _seen(self, batch: Batch, truth: Sequence[Segments], seeds: Sequence[str] | None = None) -> Seen:
        """What the frozen network makes of pictures, matched by points that follow from `seeds`, one a picture, where given."""
        proposer = self.segmenter.proposer.eval()
        with fast_on_cpu():
            proposals = proposer(batch if proposer.uses_truth else replace(batch, truth=None))
        if proposals.queries is None or proposals.competing:
            raise UserError("phase pading needs queries with masks that stand alone, such as mask2former's or eomt's")
        queries = proposals.queries.float()
        with torch.autocast(queries.device.type, enabled=False):
            masks, logits = proposals.masks.float(), self.synthesis.head(queries)
            if seeds is None:
                pairs = self.criterion.match(masks, logits, truth)
            else:
                pairs = []
                for mask, logit, one, seed in zip(masks, logits, truth, seeds, strict=True):
                    with torch.random.fork_rng([queries.device] if queries.is_cuda else []):
                        torch.manual_seed(int(seed[:15], 16))
                        pairs += self.criterion.match(mask[None], logit[None], [one])
        return queries, self.criterion.named(masks, pairs, truth)

    def _kept(self, kept: Kept, batch: Batch, truth: Sequence[Segments]) -> Seen:
        """The same, of which only those pictures are looked at that have not been kept."""
        if self._about is None:
            criterion = self.criterion
            costs = (
                criterion.points,
                criterion.name_cost,
                criterion.mask_cost,
                criterion.dice_cost,
                criterion.labelled,
            )
            at_rest = {**self.segmenter.proposer.state_dict(), **self.synthesis.head.state_dict(prefix="head.")}
            self._about = digest(at_rest.values(), *at_rest, costs)
        names = [
            digest((pixels, one.masks, one.classes), self._about, task, frame)
            for pixels, one, task, frame in zip(batch.pixels, truth, batch.tasks, batch.frames, strict=True)
        ]
        found = [kept.get(name) for name in names]
        new = [index for index, each in enumerate(found) if each is None]
        if new:
            made = self._seen(batch.take(new), [truth[index] for index in new], [names[index] for index in new])
            for index, queries, named in zip(new, *made, strict=True):
                found[index] = {"queries": queries, "named": named}
                kept.put(names[index], {"queries": queries, "named": named})
        queries, named = (
            torch.stack([each[key].to(batch.pixels.device) for each in found if each is not None])
            for key in ("queries", "named")
        )
        return queries, named

    def generator_losses(self, found: Found) -> dict[str, Float[Tensor, ""]]:
        """Weighted, by name. They reach all that makes queries, also where nothing is matched."""
        linear = self.namer.linear
        terms = self.terms(found, linear.weight.detach(), linear.bias.detach())
        return {name: self.losses.of(kind) * value for name, (kind, value) in terms.items()}

    def terms(
        self, found: Found, weight: Float[Tensor, "K1 D"], bias: Float[Tensor, " K1"]
    ) -> dict[str, tuple[Kind, Float[Tensor, ""]]]:
        """The unweighted terms of the generator's loss. `weight`, `bias`: the classifier's."""
        branch = self.synthesis
        real, classes = found.queries[found.matched], found.named[found.matched]
        projected = self._projected()
        told, wanted = projected[classes], projected[list(branch.unseen)]
        made = branch.generator(told).float()
        related, unrelated = branch.related(made).float(), branch.unrelated(made).float()
        # In the order in which the published code draws its random numbers.
        noise = branch.generator.draw(unrelated)
        new = branch.generator(wanted).float()
        new_related, new_unrelated = branch.related(new).float(), branch.unrelated(new).float()
        new_noise = branch.generator.draw(new_unrelated)
        columns = list(branch.seen) if self.table == "seen" else list(range(len(projected)))
        places = torch.empty(len(projected), dtype=torch.int64, device=classes.device)
        places[columns] = torch.arange(len(columns), device=classes.device)
        relations = branch.relation(related, projected[columns]), branch.relation(new_related, wanted)
        rebuilt = branch.rebuild(related, unrelated).float(), branch.rebuild(new_related, new_unrelated).float()
        own = torch.arange(len(wanted), device=classes.device)
        with torch.autocast(real.device.type, enabled=False):
            goal, new_goal = (told.float(), wanted.float())
            if self.deviations.targets == "detached":
                goal, new_goal = goal.detach(), new_goal.detach()
            logits = F.linear(made, weight, bias)
            logits = logits[:, :SLICE] if self.deviations.columns == "compatible" else logits
            if len(classes) and self.deviations.columns == "compatible" and int(classes.max()) >= logits.shape[1]:
                raise UserError(
                    f"deviations.columns: compatible looks at the first {SLICE} names, and a seen one comes later; take all"
                )
            alike = self.similarity
            return {
                "discrepancy": ("discrepancy", discrepancy(made, real) if len(real) else 0.0 * made.sum()),
                "name": ("name", _mean(F.cross_entropy(logits, classes, reduction="sum"), classes)),
                "relation_seen": ("relation", self._relation(relations[0], places[classes])),
                "relation_unseen": ("relation", self._relation(relations[1], own)),
                "unrelated_seen": ("unrelated", divergence(unrelated, noise.float())),
                "unrelated_unseen": ("unrelated", divergence(new_unrelated, new_noise.float())),
                "align_seen": ("align", alignment(related, related, goal, goal, alike)),
                "align_unseen": ("align", alignment(new_related, new_related, new_goal, new_goal, alike)),
                "align_between": ("align", alignment(related, new_related, goal, new_goal, alike)),
                "rebuild_seen": ("rebuild", (rebuilt[0] - made).abs().sum() / max(1, made.numel())),
                "rebuild_unseen": ("rebuild", (rebuilt[1] - new).abs().mean()),
            }

    def classifier_loss(self, found: Found) -> Float[Tensor, ""]:
        """Cross-entropy on all queries of the batch and one that is made of each of some unseen names."""
        chosen = self.shuffle(len(self.synthesis.unseen))[: self.fakes]
        names = torch.tensor(self.synthesis.unseen)[chosen].to(found.named.device)
        with torch.no_grad():
            made = self.synthesis.generator(self._projected()[names]).float()
        queries, named = torch.cat([found.queries, made]), torch.cat([found.named, names])
        with torch.autocast(queries.device.type, enabled=False):
            return F.cross_entropy(self.namer.linear(queries), named, self.class_weights.to(queries.device))

    def _projected(self) -> Float[Tensor, "K D"]:
        return self.synthesis.project(self.synthesis.get_buffer("vectors.table"))

    def _relation(self, logits: Float[Tensor, "N K"], places: Int64[Tensor, " N"]) -> Float[Tensor, ""]:
        logits = logits.float().sigmoid() if self.deviations.relations == "compatible" else logits.float()
        return _mean(F.cross_entropy(logits, places, reduction="sum"), places)

    def _check_labels(self, truth: Sequence[Segments], keys: Sequence[str]) -> None:
        unseen = set(self.synthesis.unseen)
        for one, key in zip(truth, keys, strict=True):
            found = [self.segmenter.vocabulary.names[index] for index in one.classes.tolist() if index in unseen]
            if found:
                raise UserError(
                    f"picture {key}: has labels of {listed(dict.fromkeys(found))}, which `unseen` says training "
                    "never sees; leave such out of data.train"
                )


def _mean(total: Float[Tensor, ""], rows: Tensor) -> Float[Tensor, ""]:
    """Of a sum over rows; 0 where there are none, of which torch's mean is NaN."""
    return total / max(1, len(rows))


def _check_vectors(branch: SynthesisBranch, segmenter: Segmenter) -> None:
    """Raises UserError unless every name has a vector; without numbers, on the meta device, none can be looked at."""
    if branch.vectors is None:
        raise UserError(
            "these weights have no class vectors; set namer.synthesis.kept to true, and name a file in `vectors`"
        )
    missing = [] if branch.vectors.table.is_meta else (~branch.vectors.table.isfinite().all(1)).nonzero()[:, 0].tolist()
    if missing:
        names = [segmenter.vocabulary.names[index] for index in missing]
        raise UserError(
            f"no class vectors of {listed(names)}; say namer.synthesis.vectors, a file with one for every name"
        )
