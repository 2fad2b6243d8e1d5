"""The menu of merge methods: what each is for, its parameters and their defaults. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

FLAVORS = ("lorakit", "paper", "mergekit", "peft")
SPACES = ("full", "core", "knots")
FAMILIES = {
    "sum": "The sum",
    "elementwise": "Elementwise: each weight by itself, on ΔW, never on the factors",
    "angular": "Angular: from the angles between the ΔW, without a dense matrix",
    "subspace": "Subspace: on the singular directions, without a dense matrix",
}
PARAMETERS = {
    "density": "the share of the elements that is kept",
    "epsilon": "how far the chance of keeping an element is from the density at most",
    "gamma": "the share of the largest elements that is left out",
    "seed": "of the random masks; the same seed gives the same bytes",
    "votes": "mass: a sign is elected by the sum; frequency: by the number of LoRAs",
    "scope": "what the largest elements are chosen from: tensor, row or model",
    "space": "full: on ΔW; core, knots: in coordinates of the LoRAs, without loss in a LoRA",
}
OF_ALL = "--lambda, --normalize, --match-norm and --calibrate go with every method."


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One method.

    Args:
        family: "sum", "elementwise", "angular" or "subspace".
        purpose: one line: what it is for.
        caution: one line: when it is a bad idea.
        paper: where it comes from.
        defaults: parameter -> default, of lorakit's flavor.
        flavors: whose conventions it can follow.
        flavor_defaults: flavor -> parameter -> default, where it differs.
        votes: whether the LoRAs elect a sign for each element.
        averages: whether LoRAs at strength 1 each give their mean, not their sum.
        random: whether it draws masks, from `seed`.
    """

    family: str
    purpose: str
    caution: str
    paper: str
    defaults: Mapping[str, float | str | bool] = field(default_factory=dict)
    flavors: tuple[str, ...] = ("lorakit",)
    flavor_defaults: Mapping[str, Mapping[str, float | str | bool]] = field(default_factory=dict)
    votes: bool = False
    averages: bool = False
    random: bool = False

    @property
    def spaces(self) -> tuple[str, ...]:
        """Where it can act."""
        return SPACES if self.family == "elementwise" else ()

    def meaning(self, parameter: str) -> str:
        """Return what a parameter is, in one line."""
        if parameter == "density" and self.family == "subspace":
            return "the share of the directions that all LoRAs have in common"
        return PARAMETERS[parameter]


_ALL = FLAVORS
_DARE = "Yu et al. 2023, arXiv 2311.03099"
_TIES = "Yadav et al. 2023, arXiv 2306.01708"
_DELLA = "Deep et al. 2024, arXiv 2406.11617"
_CRUMBS = "Davari and Belilovsky 2023, arXiv 2312.06795"
_ISO = "Marczak et al. 2025, arXiv 2502.04959"

MENU: Mapping[str, Entry] = {
    "linear": Entry(
        family="sum",
        purpose="The plain sum at the given strengths: what the web UI does with several LoRAs.",
        caution="LoRAs that pull one weight in opposite directions weaken each other.",
        paper="Ilharco et al. 2022, arXiv 2212.04089",
        flavors=_ALL,
    ),
    "ties": Entry(
        family="elementwise",
        purpose="Keep each LoRA's largest changes, elect a sign, average those that agree.",
        caution="Fine detail is trimmed away; at the default density 80 % of each change is.",
        paper=_TIES,
        defaults={"density": 0.2, "votes": "mass", "scope": "tensor"},
        flavors=_ALL,
        flavor_defaults={"paper": {"scope": "model"}, "mergekit": {"density": 1.0}},
        votes=True,
        averages=True,
    ),
    "dare-linear": Entry(
        family="elementwise",
        purpose="Drop random elements, scale up the rest, sum: for papers' sake and into models.",
        caution="On average the plain sum, plus noise; cut to a LoRA it is a noisy copy of linear.",
        paper=_DARE,
        defaults={"density": 0.5, "seed": 0},
        flavors=_ALL,
        flavor_defaults={"mergekit": {"density": 1.0}},
        random=True,
    ),
    "dare-ties": Entry(
        family="elementwise",
        purpose="Drop random elements, then elect signs as ties does.",
        caution="Adds noise to what ties decides; another seed gives another result.",
        paper=_DARE,
        defaults={"density": 0.5, "seed": 0, "votes": "mass"},
        flavors=_ALL,
        flavor_defaults={"mergekit": {"density": 1.0}},
        votes=True,
        averages=True,
        random=True,
    ),
    "della": Entry(
        family="elementwise",
        purpose="Drop random elements, small ones of a row more often, scale up the rest, sum.",
        caution="As dare-linear: on average the plain sum, plus noise.",
        paper=_DELLA,
        defaults={"density": 0.5, "epsilon": 0.15, "seed": 0},
        flavors=("lorakit", "paper", "mergekit"),
        flavor_defaults={"mergekit": {"density": 1.0}},
        random=True,
    ),
    "della-ties": Entry(
        family="elementwise",
        purpose="Drop as della does, then elect signs as ties does.",
        caution="Adds noise to what ties decides; another seed gives another result.",
        paper=_DELLA,
        defaults={"density": 0.5, "epsilon": 0.15, "seed": 0, "votes": "mass"},
        flavors=("lorakit", "paper", "mergekit"),
        flavor_defaults={"mergekit": {"density": 1.0}},
        votes=True,
        averages=True,
        random=True,
    ),
    "breadcrumbs": Entry(
        family="elementwise",
        purpose="Leave out the largest outliers and the smallest noise of each LoRA, then sum.",
        caution="The outliers may be the concept itself: a trained character often lives there.",
        paper=_CRUMBS,
        defaults={"density": 0.9, "gamma": 0.01, "scope": "tensor"},
        flavors=("lorakit", "paper", "mergekit"),
        flavor_defaults={"paper": {"scope": "row"}, "mergekit": {"density": 1.0}},
    ),
    "breadcrumbs-ties": Entry(
        family="elementwise",
        purpose="Leave out outliers and noise, then elect signs as ties does.",
        caution="The outliers may be the concept itself.",
        paper=_CRUMBS,
        defaults={"density": 0.9, "gamma": 0.01, "scope": "tensor", "votes": "mass"},
        flavors=("lorakit", "mergekit"),
        flavor_defaults={"mergekit": {"density": 1.0}},
        votes=True,
        averages=True,
    ),
    "magnitude": Entry(
        family="elementwise",
        purpose="Keep each LoRA's largest changes and sum them.",
        caution="Weakens every LoRA by what is trimmed; conflicts stay.",
        paper="Yadav et al. 2023, arXiv 2306.01708; PEFT's magnitude_prune",
        defaults={"density": 0.5, "scope": "tensor"},
        flavors=("lorakit", "peft"),
    ),
    "sce": Entry(
        family="elementwise",
        purpose="Keep where the LoRAs differ most, weigh each by its energy, drop minority signs.",
        caution="Strengths count by sign and size of ΔW; a strong LoRA crowds out weak ones.",
        paper="Wan et al. 2024, arXiv 2408.07990",
        defaults={"density": 1.0},
        flavors=("lorakit", "mergekit"),
        votes=True,
        averages=True,
    ),
    "slerp": Entry(
        family="angular",
        purpose="Turn from one LoRA to another along the arc: for two that are much alike.",
        caution="For two LoRAs only; unrelated ones are 90 degrees apart, where it lifts both.",
        paper="Shoemake 1985; mergekit's slerp",
        flavors=("lorakit", "mergekit"),
    ),
    "karcher": Entry(
        family="angular",
        purpose="The mean direction of any number of LoRAs on the sphere: for training variants.",
        caution="Unrelated LoRAs have no meaningful mean direction.",
        paper="Karcher 1977; mergekit's karcher",
        flavors=("lorakit", "mergekit"),
    ),
    "model-stock": Entry(
        family="angular",
        purpose="Pull the mean of several trainings of one concept towards the base.",
        caution="Unrelated LoRAs are nearly orthogonal: it then scales the result to almost 0.",
        paper="Jang et al. 2024, arXiv 2403.19522",
        flavors=("lorakit", "mergekit"),
    ),
    "tsv": Entry(
        family="subspace",
        purpose="Give each LoRA its own directions: the nearest orthogonal ones to all of them.",
        caution="LoRAs that share directions on purpose lose what they share.",
        paper="Gargiulo et al. 2024, arXiv 2412.00081",
        averages=True,
    ),
    "iso-c": Entry(
        family="subspace",
        purpose="Give every direction of the sum the same strength, so that no LoRA dominates.",
        caution="Lifts noise directions as high as the concept; tune it with --lambda.",
        paper=_ISO,
    ),
    "iso-cts": Entry(
        family="subspace",
        purpose="As iso-c, with some directions kept for each LoRA alone.",
        caution="Lifts noise directions as high as the concept; tune it with --lambda.",
        paper=_ISO,
        defaults={"density": 0.8},
    ),
    "ctm": Entry(
        family="subspace",
        purpose="Find one small basis that all LoRAs share best, and sum in it: a rank by design.",
        caution="What lies outside the shared basis is lost; give --rank.",
        paper="arXiv 2606.03723",
    ),
}
