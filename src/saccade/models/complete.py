"""What complete networks share: sizes by name, the authors' weights, files in, and a picture of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue.authors import load_state, read_checkpoint
from saccade.models.images import read_image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from typing_extensions import Self

T = TypeVar("T")


class Complete(nn.Module):
    """Base of the networks that run on files; a base class for each task stands over it.

    A subclass sets `slug`, its paper. A task gives `see`, `answer` and `drawn`.

    Attributes:
        authors_module: the authors' port of the whole network.
        authors_part: the module of the network that their files hold, and that the port is of; "" for all of it.
        in_channels: of the images, 3 or 1.
        runs_alone: whether files are all that `predict` needs.
        views: the images of one call, by the names that the network gives them; where there are several, `predict`
            takes as many files, in this order.
        documents: suffixes of the files, beside pictures and tensors, that `document` writes an output as.
        together: whether all files of a call are one thing, as the frames of a video.
    """

    slug: ClassVar[str]
    authors_module: ClassVar[str] = "network"
    authors_part: ClassVar[str] = ""
    in_channels: int = 3
    runs_alone: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("image",)
    documents: ClassVar[tuple[str, ...]] = ()
    together: ClassVar[bool] = False

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published size by the paper's name for it, e.g. "Twins-SVT-S"; `changes` go before its arguments.

        Raises:
            ValueError: if there is no such size; the message lists them.
        """
        sizes = {size.name: size for size in catalogue.part(cls.slug).published}
        if name not in sizes:
            raise ValueError(f"{cls.slug} was published as {', '.join(sizes) or 'no size'}; got {name!r}")
        model = catalogue.create(cls.slug, **{**sizes[name].arguments, **changes})
        assert isinstance(model, cls)
        return model

    @classmethod
    def from_authors(cls, path: str | Path, name: str | None = None, **changes: Any) -> Self:
        """The network with the weights of a checkpoint of the authors, ready to be run.

        >>> model = ResNeSt.from_authors("resnest101.pth", "ResNeSt-101")                        # doctest: +SKIP

        Args:
            path: of the released file.
            name: a published size; the constructor's defaults where None.
            **changes: constructor arguments that go before those of the size, like `num_classes`.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if there is no such size or port, or the file does not fit; the message names the tensors.
        """
        model = catalogue.create(cls.slug, **changes) if name is None else cls.from_config(name, **changes)
        assert isinstance(model, cls)
        return model.load(path).eval()

    def load(self, path: str | Path) -> Self:
        """Take the weights of a file, by name: a state dict of this network, or a checkpoint of the authors.

        What the authors' file does not hold (`authors_part`) stays as it is.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it does not fit.
        """
        state, what = read_checkpoint(path), type(self).__name__
        try:
            own = state.keys() == self.state_dict().keys()
            if own:
                load_state(self, state)
            else:
                what = f"the {self.authors_part} of {what}" if self.authors_part else what
                converted = catalogue.port(self.slug, self.authors_module).convert(state)
                load_state(self.get_submodule(self.authors_part), converted)
        except Exception as error:  # what a port meets in a file it was not written for is any exception
            raise ValueError(f"{path} does not fit {what}: {error or type(error).__name__}") from error
        if not own:
            self.as_released()
        return self

    def as_released(self) -> None:
        """Compute as the authors' code does where the paper means another thing; done when their weights are loaded."""

    def predict(self, files: str | Path | Sequence[str | Path]) -> Any:
        """What the network says of image files, in evaluation and without gradients.

        Args:
            files: an image, or several; one for each of `views` where these are several.

        Returns:
            The output of its task, with maps of the images' own size and the `images` themselves.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if there is none, they are not as many as the views, one is no image, or the images do not go
                together.
        """
        return self.on_files(files, self.see)

    def on_files(self, files: str | Path | Sequence[str | Path], see: Callable[[list[Tensor]], T]) -> T:
        """`predict`, with what sees the images; for a network that is told more than the files."""
        paths = [files] if isinstance(files, (str, Path)) else list(files)
        if not paths:
            raise ValueError("files must be at least one image, got none")
        if len(self.views) > 1 and len(paths) != len(self.views):
            raise ValueError(f"files must be {len(self.views)} ({', '.join(self.views)}), got {len(paths)}")
        weight = next(self.parameters())
        images = [read_image(path).to(weight.device, weight.dtype) for path in paths]
        training = self.training
        try:
            with torch.no_grad():
                self.eval()
                return see(images)
        finally:
            self.train(training)

    def see(self, images: Sequence[Tensor]) -> Any:
        """The output on images (3, H, W) in [0, 1]: made ready, run, and brought back to their size."""
        raise NotImplementedError

    def answer(self, output: Any, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What an output says of each image, in a few words and numbers.

        Args:
            names: of the classes; their numbers where None.

        Raises:
            ValueError: if the names are not as many as the classes.
        """
        raise NotImplementedError

    def picture(self, output: Any, names: Sequence[str] | None = None) -> Picture:
        """An output of `predict` as a picture; several images stand below each other.

        Args:
            names: of the classes; their numbers where None.

        Raises:
            ValueError: if the output is not one of `predict`.
        """
        if output.images is None:
            raise ValueError("output must be one of predict, which holds the images; this one has none")
        return self.drawn(output, names)

    def drawn(self, output: Any, names: Sequence[str] | None) -> Picture:
        """`picture`, of an output that has its images."""
        raise NotImplementedError

    def document(self, output: Any, place: Path, files: Sequence[Path]) -> dict[Path, bytes]:
        """An output of `predict` as files of another form, by where they go.

        Args:
            output: of one call.
            place: where the user wants it, with a suffix of `documents`.
            files: that were read.

        Raises:
            ValueError: if the output cannot be written so.
        """
        raise NotImplementedError


def batch(images: Sequence[Tensor]) -> Tensor:
    """Images of one size as (B, 3, H, W).

    Raises:
        ValueError: if they differ.
    """
    sizes = sorted({f"{image.shape[2]} x {image.shape[1]}" for image in images})
    if len(sizes) > 1:
        raise ValueError(f"images of one call must have one size, got {', '.join(sizes)}: give them one by one")
    return torch.stack(list(images))


def labels(count: int, names: Sequence[str] | None) -> list[str]:
    """A name for each class.

    Raises:
        ValueError: if there are not as many names.
    """
    if names is None:
        return [f"class {number}" for number in range(count)]
    if len(names) != count:
        raise ValueError(f"names must be one for each of {count} classes, got {len(names)}")
    return list(names)
