"""The options of a merge method, checked against the menu. No torch."""

from dataclasses import dataclass, fields, replace

from lorakit.errors import SpecError
from lorakit.methods.menu import FLAVORS, MENU, SPACES, Entry

CHOICES = {
    "space": SPACES,
    "votes": ("mass", "frequency"),
    "scope": ("tensor", "row", "model"),
    "flavor": FLAVORS,
    "match_norm": ("none", "mean", "linear"),
    "calibrate": ("none", "pico"),
}
_OF_ALL = ("name", "lambda_", "normalize", "flavor", "match_norm", "calibrate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How the ΔW of one module are combined; what is left out takes the method's default.

    Args:
        name: one of those that `lorakit methods` lists.
        space: where an elementwise method acts: "full", "core" or "knots".
        density: the share of the elements that is kept.
        epsilon: della: how far the chance of keeping an element is from `density` at most.
        gamma: breadcrumbs: the share of the largest elements that is left out.
        seed: of the random masks.
        votes: "mass": a sign is elected by the sum; "frequency": by the number of LoRAs.
        scope: what the largest elements are chosen from: a "tensor", a "row" or the "model".
        lambda_: multiplies the result.
        normalize: divide by the sum of the strengths' sizes: a mean in place of a sum.
        flavor: whose conventions, where they differ.
        match_norm: give the result the "mean" norm of the inputs, or that of their "linear" sum.
        calibrate: "pico": weaken the directions that the LoRAs share before they are merged.

    Raises:
        SpecError: the method is unknown, does not take a parameter, or a value is out of range.
    """

    name: str = "linear"
    space: str | None = None
    density: float | None = None
    epsilon: float | None = None
    gamma: float | None = None
    seed: int | None = None
    votes: str | None = None
    scope: str | None = None
    lambda_: float = 1.0
    normalize: bool = False
    flavor: str = "lorakit"
    match_norm: str | None = None
    calibrate: str = "none"

    def __post_init__(self) -> None:
        if self.name not in MENU:
            raise SpecError(f"Method '{self.name}' is unknown; there are {', '.join(MENU)}.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise SpecError(f"{name} must be one of {', '.join(choices)}, found '{value}'.")
        self._check_taken()
        self._check_ranges()

    def _check_taken(self) -> None:
        entry = self.entry
        if self.flavor not in entry.flavors:
            raise SpecError(
                f"{self.name} has no flavor '{self.flavor}'; it has {', '.join(entry.flavors)}."
            )
        if self.space is not None and not entry.spaces:
            raise SpecError(f"{self.name} is not elementwise and takes no space.")
        if self.scope == "model" and self.space in ("core", "knots"):
            raise SpecError("scope model trims the elements of ΔW; it acts in the full space only.")
        if self.scope == "model" and "gamma" in entry.defaults:
            raise SpecError(
                f"{self.name} leaves out the outliers of a tensor or of a row, not of the model; "
                "use scope tensor or row."
            )
        for field in fields(self):
            taken = field.name in (*_OF_ALL, "space", *entry.defaults)
            if not taken and getattr(self, field.name) is not None:
                raise SpecError(
                    f"{self.name} takes no {field.name}; "
                    f"it takes {', '.join(entry.defaults) or 'no parameters'}."
                )

    def _check_ranges(self) -> None:
        ranges = {"density": (0.0, 1.0), "epsilon": (0.0, 1.0), "gamma": (0.0, 1.0)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise SpecError(f"{name} must lie between {low:g} and {high:g}, found {value:g}.")
        if self.density == 0.0:
            raise SpecError("density 0 keeps nothing; give a share above 0.")
        self._check_chances()
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise SpecError(f"seed must lie between 0 and 2^63 - 1, found {self.seed}.")
        if not abs(self.lambda_) < float("inf"):
            raise SpecError(f"lambda must be a finite number, found {self.lambda_}.")

    def _check_chances(self) -> None:
        defaults = self.entry.defaults
        if "epsilon" not in defaults or self.density == 1.0:
            return
        density = float(defaults["density"] if self.density is None else self.density)
        epsilon = float(defaults["epsilon"] if self.epsilon is None else self.epsilon)
        most = min(density, 1 - density)
        if epsilon > most + 1e-12:
            raise SpecError(
                f"{self.name} keeps elements with chances from density - epsilon to density + "
                f"epsilon, {density - epsilon:g} to {density + epsilon:g} here; give an epsilon of "
                f"at most {most:g}."
            )

    @property
    def entry(self) -> Entry:
        """What the menu says of the method."""
        return MENU[self.name]

    @property
    def plain(self) -> bool:
        """Whether it is the exact signed sum and nothing else."""
        return (
            self.name == "linear"
            and self.calibrate == "none"
            and self.match_norm in (None, "none")
            and not self.normalize
            and self.lambda_ == 1.0
        )

    @property
    def without_noise(self) -> "Method":
        """The plain sum with all that this method does to its own result."""
        nothing = dict.fromkeys(("space", *self.entry.defaults))
        return replace(self, name="linear", **nothing)  # type: ignore[arg-type]

    def filled(self, *, into_lora: bool) -> "Method":
        """Return the method with every parameter that it takes set.

        Args:
            into_lora: whether the result becomes a LoRA: then the core space loses nothing.
        """
        entry = self.entry
        defaults = {**entry.defaults, **entry.flavor_defaults.get(self.flavor, {})}
        if entry.spaces:
            ours = self.flavor == "lorakit" and self.scope != "model"
            defaults["space"] = "core" if into_lora and ours else "full"
        defaults["match_norm"] = "none" if self.calibrate == "none" else "mean"
        chosen = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **chosen)  # type: ignore[arg-type]


LINEAR = Method()
