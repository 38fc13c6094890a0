"""A VAE and its objective as a chain of steps, so that its layers can stand on several ranks.

    x -- encoder's pieces --> q -- draw --> z, KL, (log q - log p) -- decoder's pieces --> params, KL, ... --> loss

What the loss needs besides p(x|z) travels along with z. All noise of a batch is drawn at once, as an unsplit model
draws it, whatever the micro-batches: each takes the rows of its examples.

Shapes: B examples of a micro-batch, K samples of each, L latent dimensions of a layer.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor, nn

from hvdvae.batch import Batch, examples_of
from hvdvae.vae.gaussian import DiagonalGaussian
from hvdvae.vae.model import VAE, Terms
from hvdvae.vae.noise import BatchNoise
from hvdvae.vae.objectives import Iwae, Losses, Objective
from hvdvae.vae.pieces import Piece

Tensors = tuple[Tensor, ...]


class VaeStep(NamedTuple):
    """As stages.Step."""

    modules: tuple[str, ...]
    run: Callable[[Tensors, slice], Tensors]


class VaeChain:
    """As stages.Chain."""

    def __init__(self, model: VAE, objective: Objective, samples: int) -> None:
        """`samples`: latents an example that the objective asks for."""
        self._model, self._objective, self._samples = model, objective, samples
        self._importance = isinstance(objective, Iwae)
        self._noise = BatchNoise(0)
        encoder = [_step("encoder", piece) for piece in model.encoder.pieces()]  # type: ignore[operator]
        decoder = [_step("decoder", piece) for piece in model.decoder.pieces()]  # type: ignore[operator]
        *first, last = encoder
        upper = tuple(f"upper.{number}" for number in range(len(model.upper)))
        drawn = VaeStep((*last.modules, *upper), lambda packed, place: self._draw(last.run(packed, place), place))
        self.steps = [*first, drawn, *decoder]
        self.default_cuts = (0, len(encoder))
        """Encoder and decoder."""

    def begin(self, batch: Batch) -> None:
        """As Chain's."""
        self._noise = BatchNoise(examples_of(batch))

    def inputs(self, micro: Batch) -> Tensors:
        """As Chain's: x, (B, *shape)."""
        return (cast(Tensor, micro),)

    def loss(self, outputs: Tensors, micro: Batch, epoch: float) -> Losses:
        """As Chain's. outputs: the likelihood's parameters (K B, *wide), and what _draw tells besides z."""
        params, *rest = outputs
        x = cast(Tensor, micro)
        ratio = rest.pop() if self._importance else None
        log_px = self._model.likelihood.log_prob(params.view(self._samples, len(x), *params.shape[1:]), x)
        terms = Terms(log_px, tuple(rest), ratio)
        return self._objective(cast(nn.Module, lambda *_, **__: terms), x, epoch)

    def _draw(self, payload: Tensors, place: slice) -> Tensors:
        """q (B, 2L) to z (K B, L), KL of each layer (1 or K, B, L), and where asked for log q - log p (K, B)."""
        q = DiagonalGaussian(payload[0])
        mine = self._noise.rows(place, self._samples, self._model.latent, q.packed.device)
        drawn = self._model.draw(q, self._samples, self._importance, mine)
        ratio = () if drawn.log_ratio is None else (drawn.log_ratio,)
        return drawn.z.flatten(0, -2), *drawn.kl, *ratio


def _step(network: str, piece: Piece) -> VaeStep:
    names = tuple(f"{network}.{name}" for name in piece.modules)
    return VaeStep(names, lambda payload, place: (piece.run(payload[0]), *payload[1:]))
