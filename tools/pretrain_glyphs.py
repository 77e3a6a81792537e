"""Pretrain the small vision transformer behind the embedded `digits_l2p` experiment.

The backbone is pretrained on characters that this script renders from the TrueType fonts inside
matplotlib and distorts like handwriting: bent, drawn with another pen, scanned. It is trained on no
handwritten image. Rendered digits are among the classes, as animals and vehicles of CIFAR-100 are
in ImageNet-21k, and three images in ten show one.

    python tools/pretrain_glyphs.py          # writes assets/glyph_vit.safetensors

Data: 22 fonts, ten digits and 120 other characters (letters, Greek, Cyrillic, symbols), 704,000
images in all. Six in seven are reduced to 8 x 8 cells of 17 levels and enlarged again: the form of
the scans in scikit-learn's `load_digits`. None of those is used for training, but the size of the
characters in their frame and the characters that count as a digit (`DIGIT_SHAPES`) were chosen by
looking at the training part of them.

The defaults are the settings of the shipped file. With them, training took 47 minutes on one thread
of a busy two-core machine and reached an accuracy of 84 % on all distorted characters, 92 % on
digits.

The file (2.4 MB) holds the weights of a timm ViT in half precision, under timm's own names and
without a classification head. Inputs are plain [0, 1] RGB tensors, bright strokes on dark. Needs
torch 2.9 or newer, for Muon.

Shapes: B images, G glyphs in the atlas, S pixels a side, D width, N patches, P extra tokens.
"""

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from PIL import Image, ImageFont
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

DIGITS = "0123456789"
#: Characters with the shape of a handwritten digit, which count as that digit.
DIGIT_SHAPES = {"0": "O", "1": "lI|", "4": "Ч", "9": "q"}
#: Code points of zero in Unicode's bold, sans-serif, sans-serif bold and monospace digits.
DIGIT_STYLES = (0x1D7CE, 0x1D7E2, 0x1D7EC, 0x1D7F6)
#: One class each; without characters that look like a digit or a capital in 8 x 8 cells.
OTHERS = (
    "ABCDEFGHJKLMNPQRSTUVWXYZabdefhijkmnprty"
    "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθκλμξπρστφχψω"
    "БГДЖИЛЦШЩЪЫЭЮЯ"
    "!?#$%&@+=*/<>[{(~^√∞∂∫∑∇∈∩⊂⊕⊥∀∃≈≠≤←↑↔"
)

#: Beginnings of the names of matplotlib's fonts that have few characters or their own encoding.
SKIPPED_FONTS = ("LastResort", "STIXSiz", "STIXNonUni", "cmex", "cmsy", "cmmi", "DejaVuSansDisplay")

ATLAS_SIDE = 48
GLYPH_HEIGHT = 34


@dataclass(frozen=True)
class PretrainOptions:
    """Options of this program; see `parse_args` for the defaults.

    Attributes:
        output: File of the weights.
        seed: Seed of everything that is random.
        num_threads: Threads of torch.
        input_size: Pixels a side of the images.
        patch_size: Pixels a side of a patch.
        embed_dim: Width of the ViT (D).
        depth: Its blocks.
        num_heads: Its attention heads.
        digit_share: Share of the images that show a digit.
        elastic: Amplitude of the elastic distortion, in half images.
        steps: Training steps.
        batch_size: Images of a step.
        lr: Highest learning rate.
        weight_decay: Weight decay of the matrices.
        label_smoothing: Label smoothing.
        max_extra_tokens: Most extra tokens of a step (P).
    """

    output: Path
    seed: int
    num_threads: int
    input_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    digit_share: float
    elastic: float
    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    label_smoothing: float
    max_extra_tokens: int


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the backbone and writes its weights."""
    options = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(options.seed)
    sampler = GlyphSampler(options.input_size, options.digit_share, options.elastic)
    model = GlyphClassifier(build_vit(options), sampler.num_classes)
    seconds = train(model, sampler, options)
    save_backbone(model.vit, options.output)
    logger.info("wrote %s after %.1f minutes of training", options.output, seconds / 60)


def parse_args(argv: Sequence[str] | None = None) -> PretrainOptions:
    """Reads the command line; its defaults are the settings of the shipped file."""
    parser = argparse.ArgumentParser(
        description="Pretrain the backbone of digits_l2p on drawn characters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("assets/glyph_vit.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=1)

    model = parser.add_argument_group("model, relative to timm's vit_tiny_patch16_224")
    model.add_argument("--input_size", type=int, default=32)
    model.add_argument("--patch_size", type=int, default=8)
    model.add_argument("--embed_dim", type=int, default=128)
    model.add_argument("--depth", type=int, default=6)
    model.add_argument("--num_heads", type=int, default=4)

    data = parser.add_argument_group("glyphs")
    data.add_argument("--digit_share", type=float, default=0.3, help="share of digits in a batch")
    data.add_argument("--elastic", type=float, default=0.1, help="largest bend, in half images")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=5500)
    training.add_argument("--batch_size", type=int, default=128)
    training.add_argument("--lr", type=float, default=4e-3)
    training.add_argument("--weight_decay", type=float, default=0.05)
    training.add_argument("--label_smoothing", type=float, default=0.1)
    training.add_argument("--max_extra_tokens", type=int, default=10)
    return PretrainOptions(**vars(parser.parse_args(argv)))


def build_vit(options: PretrainOptions) -> VisionTransformer:
    """Builds the untrained backbone, without a classification head."""
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=options.input_size,
        patch_size=options.patch_size,
        embed_dim=options.embed_dim,
        depth=options.depth,
        num_heads=options.num_heads,
        num_classes=0,
    )
    assert isinstance(vit, VisionTransformer)
    return vit


class GlyphClassifier(nn.Module):
    """A timm ViT that is trained to classify from its class token and from extra tokens behind it.

    The extra tokens are random in every step and take the place of L2P's prompts, so that the
    backbone learns to gather information about the image in tokens that are inserted there.
    """

    def __init__(self, vit: VisionTransformer, num_classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.embed_dim, num_classes)

    def forward(self, images: Tensor, num_extra: int) -> list[Tensor]:
        """Returns the logits of the class token and, if there are any, of the mean extra token."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))  # (B, 1+N, D)
        batch, _, width = tokens.shape
        assert self.vit.pos_embed is not None
        strength = torch.rand(batch, 1, 1)
        extra = strength * torch.empty(batch, num_extra, width).uniform_(-1, 1)
        extra = extra + self.vit.pos_embed[:, :1]  # (B, P, D)
        tokens = torch.cat([tokens[:, :1], extra, tokens[:, 1:]], dim=1)  # (B, 1+P+N, D)
        features = self.vit.norm(self.vit.blocks(tokens))
        pooled = [features[:, 0]]  # each (B, D)
        if num_extra:
            pooled.append(features[:, 1 : 1 + num_extra].mean(dim=1))
        return [self.head(one) for one in pooled]


def train(model: GlyphClassifier, sampler: "GlyphSampler", options: PretrainOptions) -> float:
    """Trains in place: Muon for the matrices of the blocks, AdamW for everything else.

    Returns:
        Seconds taken.
    """
    matrices = [p for p in model.vit.blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizers = [
        torch.optim.Muon(
            matrices,
            lr=options.lr,
            weight_decay=options.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _warm_cosine(i, options.steps))
        for optimizer in optimizers
    ]
    criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    start, sums = time.perf_counter(), torch.zeros(3)  # of loss, accuracy, accuracy on digits
    for step in range(1, options.steps + 1):
        images, labels = sampler.batch(options.batch_size)
        # About a third of the steps have no extra tokens, like the pass that gives L2P its query.
        num_extra = max(0, int(torch.randint(-3, options.max_extra_tokens + 1, ())))
        logits = model(images, num_extra)
        loss = torch.stack([criterion(one, labels) for one in logits]).sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        hit = (logits[0].argmax(1) == labels).float()
        sums += torch.stack([loss.detach() / len(logits), hit.mean(), hit[labels < 10].mean()])
        if step % 100 == 0:
            loss_mean, accuracy, digits = (sums * torch.tensor([0.01, 1.0, 1.0])).tolist()
            logger.info(
                "step %d of %d: loss %.3f, accuracy %.1f %% (digits %.1f %%), %.0f s",
                *(step, options.steps, loss_mean, accuracy, digits, time.perf_counter() - start),
            )
            sums.zero_()
    return time.perf_counter() - start


def save_backbone(vit: VisionTransformer, path: Path) -> None:
    """Writes the weights in half precision under timm's names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in vit.state_dict().items()}
    save_file(state, path)


def _warm_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: 5 % linear warm-up, then half a cosine down to zero."""
    return min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


class GlyphSampler:
    """An endless source of distorted glyphs.

    Args:
        side: Pixels a side of the images.
        digit_share: Share of the images that show a digit; the other classes share the rest evenly.
        elastic: Amplitude of the elastic distortion, in half images.
    """

    def __init__(self, side: int, digit_share: float, elastic: float) -> None:
        self.side, self.elastic = side, elastic
        self.num_classes = len(character_classes())
        self.glyphs, self.labels = build_atlas()  # (G, 2, S, S), (G,)
        share = torch.full((self.num_classes,), (1 - digit_share) / (self.num_classes - 10))
        share[:10] = digit_share / 10
        self.weights = (share / torch.bincount(self.labels))[self.labels]  # (G,)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Draws images, (B, 3, S, S) in [0, 1], and their classes, (B,)."""
        chosen = torch.multinomial(self.weights, size, replacement=True)
        thinned = torch.randint(2, (size,))
        ink = write_by_hand(self.glyphs[chosen, thinned, None], self.elastic)
        num_cells = 8 if torch.rand(()) < 0.85 else int(torch.randint(6, 17, ()))
        return disturb(enlarge(scan(ink, num_cells), self.side)), self.labels[chosen]


def character_classes() -> list[str]:
    """The characters of each class, as a string; digits come first."""
    digits = [
        digit + DIGIT_SHAPES.get(digit, "") + "".join(chr(first + i) for first in DIGIT_STYLES)
        for i, digit in enumerate(DIGITS)
    ]
    return digits + list(OTHERS)


def build_atlas() -> tuple[Tensor, Tensor]:
    """Renders every character in every font of matplotlib that has it.

    Returns:
        Glyphs as rendered and thinned to lines, (G, 2, S, S) in [0, 1], and their classes, (G,).
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn, labels = [], []
    for path in sorted(folder.glob("*.ttf")):
        if path.name.startswith(SKIPPED_FONTS):
            continue
        font = ImageFont.truetype(str(path), 96)
        missing = bytes(font.getmask("\U0010fffe"))
        for label, characters in enumerate(character_classes()):
            for character in characters:
                mask = font.getmask(character)
                if mask.getbbox() and bytes(mask) != missing:
                    drawn.append(_on_canvas(Image.frombytes("L", mask.size, bytes(mask))))
                    labels.append(label)
    glyphs = np.stack(drawn)  # (G, S, S)
    both = np.stack([glyphs, thin(glyphs > 0.5)], axis=1)
    return torch.from_numpy(both.astype(np.float32)), torch.tensor(labels)


def _on_canvas(glyph: Image.Image) -> np.ndarray:
    """Scales a glyph to a fixed height in the middle of a canvas, (S, S) in [0, 1]."""
    glyph = glyph.crop(glyph.getbbox())
    width = round(GLYPH_HEIGHT * min(max(glyph.width / glyph.height, 0.35), 1.1))
    canvas = Image.new("L", (ATLAS_SIDE, ATLAS_SIDE))
    corner = ((ATLAS_SIDE - width) // 2, (ATLAS_SIDE - GLYPH_HEIGHT) // 2)
    canvas.paste(glyph.resize((width, GLYPH_HEIGHT), Image.Resampling.BILINEAR), corner)
    return np.asarray(canvas, dtype=np.float32) / 255


def thin(ink: np.ndarray) -> np.ndarray:
    """Thins strokes to lines of one pixel.

    Args:
        ink: Whether there is ink, (G, S, S).

    Returns:
        The same, thinned.

    Source: Zhang and Suen, "A fast parallel algorithm for thinning digital patterns", 1984.
    """
    ink, before = ink.copy(), -1
    while before != (before := int(ink.sum())):
        for first_half in (True, False):
            ring = _neighbours(ink)
            north, east, south, west = ring[::2]
            count = np.sum(ring, axis=0)
            pairs = zip(ring, ring[1:] + ring[:1], strict=True)
            rises = np.sum([~a & b for a, b in pairs], axis=0)
            blocked = (
                (north & east & south) | (east & south & west)
                if first_half
                else (north & east & west) | (north & south & west)
            )
            ink &= ~((count >= 2) & (count <= 6) & (rises == 1) & ~blocked)
    return ink


def _neighbours(ink: np.ndarray) -> list[np.ndarray]:
    """The eight neighbours of every pixel, clockwise from the north, each (G, S, S)."""
    side = ink.shape[-1]
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    corners = ((0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0))
    return [padded[:, row : row + side, col : col + side] for row, col in corners]


def write_by_hand(glyphs: Tensor, elastic: float) -> Tensor:
    """Distorts glyphs like handwriting: bars across, slant, uneven strokes, another pen.

    Args:
        glyphs: Characters in [0, 1], (B, 1, S, S).
        elastic: Amplitude of the elastic distortion, in half images.

    Returns:
        Ink, 0 or 1, (B, 1, S, S).
    """
    batch, _, side, _ = glyphs.shape
    turn, slant = 0.12 * torch.randn(batch), 0.2 * torch.randn(batch)
    size = torch.empty(2, batch).uniform_(0.85, 1.2)
    across = torch.stack([turn.cos() * size[0], turn.sin() + slant, torch.zeros(batch)], dim=1)
    down = torch.stack([-turn.sin(), turn.cos() * size[1], torch.zeros(batch)], dim=1)
    affine = torch.stack([across, down], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(affine, [batch, 1, side, side], align_corners=False)  # (B, S, S, 2)
    for num_knots, share in ((4, 1.0), (7, 0.35)):
        amplitude = share * elastic * torch.empty(batch, 1, 1, 1).uniform_(0.2, 1.0)
        field = amplitude * torch.randn(batch, 2, num_knots, num_knots)
        field = F.interpolate(field, size=(side, side), mode="bicubic", align_corners=True)
        grid = grid + field.permute(0, 2, 3, 1)
    return _draw_with_pen(F.grid_sample(_cross(glyphs), grid, align_corners=False))


def _cross(glyphs: Tensor, share: float = 0.12) -> Tensor:
    """Draws a bar across the middle of some glyphs, as in a crossed seven, (B, 1, S, S)."""
    batch, _, side, _ = glyphs.shape
    position = (torch.arange(side) + 0.5) / side
    height = torch.empty(batch, 1).uniform_(0.42, 0.58)
    half_length = torch.empty(batch, 1).uniform_(0.1, 0.22)
    row = (position - height).abs() < 0.025  # (B, S)
    column = (position - 0.5).abs() < half_length  # (B, S)
    bar = row[:, :, None] & column[:, None, :] & (torch.rand(batch, 1, 1) < share)
    return torch.maximum(glyphs, bar[:, None].float())


def _draw_with_pen(glyphs: Tensor) -> Tensor:
    """Gives strokes a new width: blurs, then inks the darkest 20-55 % of the glyph's box."""
    ink = _blur(glyphs, sigma=1.8)
    flat = ink.flatten(1)  # (B, S*S)
    darkest = flat.amax(dim=1, keepdim=True)  # (B, 1)
    seen = ink[:, 0] > 0.15 * darkest[:, :, None]  # (B, S, S)
    area = seen.any(dim=1).sum(dim=1) * seen.any(dim=2).sum(dim=1)  # (B,)
    rank = (area * torch.empty(len(ink)).uniform_(0.2, 0.55)).long()
    level = flat.sort(dim=1, descending=True).values.gather(1, rank[:, None])  # (B, 1)
    level = torch.clamp(level, 0.12 * darkest, 0.8 * darkest)
    return (ink > level[:, :, None, None]).float()


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, (B, 1, S, S)."""
    radius = math.ceil(2.5 * sigma)
    kernel = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    images = F.conv2d(images, kernel.view(1, 1, 1, -1), padding=(0, radius))
    return F.conv2d(images, kernel.view(1, 1, -1, 1), padding=(radius, 0))


def scan(ink: Tensor, num_cells: int) -> Tensor:
    """Frames the ink and averages it in cells of 4 x 4 pixels, as in the scans of the digits.

    Args:
        ink: 0 or 1, (B, 1, S, S).
        num_cells: Cells a side.

    Returns:
        Share of ink in each cell, in [0, 1], (B, 1, num_cells, num_cells).
    """
    batch, _, side, _ = ink.shape
    position = (2 * torch.arange(side) + 1) / side - 1
    centre, half = torch.empty(2, batch, 2).unbind()
    for axis, summed in enumerate((2, 3)):  # across, down
        seen = ink.amax(dim=summed)[:, 0] > 0  # (B, S)
        low = torch.where(seen, position, 1.0).amin(dim=1)
        high = torch.where(seen, position, -1.0).amax(dim=1)
        centre[:, axis] = (low + high) / 2
        half[:, axis] = (high - low) / 2 + 1 / side
    # Most glyphs fill their frame from top to bottom, and 60-90 % of its width unless narrow.
    filled = torch.empty(batch, 2).uniform_(0.7, 1.1)
    filled[:, 1] = torch.where(torch.rand(batch) < 0.6, 1.0, filled[:, 1])
    widest = torch.empty(batch).uniform_(1.0, 3.0) * half[:, 0] / half[:, 1]
    filled[:, 0] = torch.minimum(torch.empty(batch).uniform_(0.6, 0.9), widest)
    slack = 0.04 * torch.randn(batch, 2) + (1 - filled).clamp_min(0) * (torch.rand(batch, 2) - 0.5)
    affine = torch.zeros(batch, 2, 3)
    affine[:, [0, 1], [0, 1]] = half / filled
    affine[:, :, 2] = centre + slack * half
    grid = F.affine_grid(affine, [batch, 1, 4 * num_cells, 4 * num_cells], align_corners=False)
    framed = F.grid_sample(ink, grid, align_corners=False)
    return F.avg_pool2d((framed > 0.5).float(), 4)


def enlarge(cells: Tensor, side: int) -> Tensor:
    """Adds noise, rounds to 17 levels and enlarges the whole scan or a window of it.

    Args:
        cells: Shares in [0, 1], (B, 1, cells, cells).
        side: Pixels a side to enlarge to.

    Returns:
        Images in [0, 1], (B, 1, side, side).
    """
    noise = torch.randn_like(cells) * torch.empty(len(cells), 1, 1, 1).uniform_(0, 0.12)
    cells = ((cells + noise).clamp(0, 1) * 16).round() / 16
    images = F.interpolate(cells, size=(side, side), mode="bicubic", antialias=True)
    return _crop(images.clamp(0, 1))


def _crop(images: Tensor, share: float = 0.5) -> Tensor:
    """Enlarges a random window (60-100 % of the area) of some images, (B, 1, S, S)."""
    batch = len(images)
    area = torch.empty(batch).uniform_(0.6, 1.0)
    ratio = torch.empty(batch).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    window = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1)  # (B, 2)
    window = torch.where(torch.rand(batch, 1) < share, window.clamp_max(1.0), 1.0)
    affine = torch.zeros(batch, 2, 3)
    affine[:, [0, 1], [0, 1]] = window
    affine[:, :, 2] = (1 - window) * torch.empty(batch, 2).uniform_(-1, 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def disturb(images: Tensor) -> Tensor:
    """Erases a patch of some images, changes contrast and brightness, adds noise.

    Args:
        images: Pixels in [0, 1], (B, 1, S, S).

    Returns:
        Pixels in [0, 1], (B, 3, S, S), the channels equal.
    """
    batch = len(images)
    images = _erase(images)
    contrast = torch.empty(batch, 1, 1, 1).uniform_(0.7, 1.0)
    brightness = torch.rand(batch, 1, 1, 1) * (1 - contrast) / 2
    noise = torch.randn_like(images) * torch.empty(batch, 1, 1, 1).uniform_(0, 0.05)
    return (images * contrast + brightness + noise).clamp(0, 1).expand(-1, 3, -1, -1)


def _erase(images: Tensor, share: float = 0.3) -> Tensor:
    """Blackens a small rectangle of some images, (B, 1, S, S)."""
    batch, _, side, _ = images.shape
    position = (torch.arange(side) + 0.5) / side
    centre = torch.rand(batch, 2, 1)
    half = torch.empty(batch, 2, 1).uniform_(0.05, 0.17)
    inside = ((position - centre).abs() < half) & (torch.rand(batch, 1, 1) < share)  # (B, 2, S)
    return images.masked_fill(inside[:, :1, :, None] & inside[:, 1:, None, :], 0.0)


if __name__ == "__main__":
    main()
