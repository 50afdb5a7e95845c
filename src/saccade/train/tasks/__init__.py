"""The tasks on which parts are compared, a file each: data, model around the part, loss, quality.

| task | what is learned | quality | parts |
|---|---|---|---|
| `text` | the next byte of English, or of the user's files | bits per byte on held-out text | causal sequence |
| `recall` | values of keys seen before (associative recall) | accuracy on the queried values | causal sequence |
| `listops` | the value of a nested expression | accuracy | sequence |
| `digits` | the digit of an image read as 64 tokens | accuracy | sequence |
| `digits-cnn` | the digit, by a small CNN with the gate in each block | accuracy | gate |
| `paired` | the digit of two noisy views, either may be missing | accuracy | fusion |
| `fuse` | a scene of two views that each lost something | SSIM | models that fuse |
| `restore` | a photograph that is in haze, or lost resolution | PSNR | models that restore |
| `segment` | the class of each pixel: coins, cells, vessels, shapes | mean IoU | models that segment |
| `salient` | which pixels stand out: shapes on photographs, with depth | S-measure | models of saliency |
| `detect` | where digits and shapes lie on photographs | AP | models that find objects |
| `match` | which points of two views of a photograph show the same | AUC of corners | models that match |
| `recognise` | whose face, or which digit, several degraded views show | mAP | models of embeddings |
| `retrieve` | which picture a request or a description asks for | recall@1 | models of images and texts |
| `look` | where people look: in scenes, in arrays, at photographs | AUC | models of gaze |
| `caption` | what a scene of shapes and digits shows, in a sentence | exact match | models that caption |
| `track` | where points of moving textures are, and whether they are seen | AJ | models that follow points |
| `click` | which rows of categories are clicked, or the user's logs | AUC | models of clicks |
| `localise` | when something is heard or seen, or what a question asks for | mAP | models of events and moments |
| `explain` | which class a family of words says, when it is asked for | evidence found by the best map | sequence |
| `explain-cnn` | which small form is among scrambled ones | evidence found by the best map | gate |
| `speculate` | what SmolLM2 says next, guessed ahead and verified | tokens a pass | models that draft |

A task is entered in `TASKS`, and says in `kinds` and `needs` which parts it takes; `taking(part)` asks all of them.
"""

from __future__ import annotations

from saccade import catalogue
from saccade.train.tasks.base import TURN as TURN
from saccade.train.tasks.base import Task as Task
from saccade.train.tasks.caption import Caption as Caption
from saccade.train.tasks.click import Click as Click
from saccade.train.tasks.detect import Detect as Detect
from saccade.train.tasks.digits import Digits as Digits
from saccade.train.tasks.digits_cnn import DigitsCNN as DigitsCNN
from saccade.train.tasks.explain import Explain as Explain
from saccade.train.tasks.explain_cnn import ExplainCNN as ExplainCNN
from saccade.train.tasks.fuse import Fuse as Fuse
from saccade.train.tasks.listops import ListOps as ListOps
from saccade.train.tasks.localise import Localise as Localise
from saccade.train.tasks.look import Look as Look
from saccade.train.tasks.match import Match as Match
from saccade.train.tasks.own import Own as Own
from saccade.train.tasks.paired import PairedViews as PairedViews
from saccade.train.tasks.recall import Recall as Recall
from saccade.train.tasks.recognise import Recognise as Recognise
from saccade.train.tasks.restore import Restore as Restore
from saccade.train.tasks.retrieve import Retrieve as Retrieve
from saccade.train.tasks.segment import Salient as Salient
from saccade.train.tasks.segment import Segment as Segment
from saccade.train.tasks.sequence import SequenceTask as SequenceTask
from saccade.train.tasks.settings import Settings as Settings
from saccade.train.tasks.speculate import Speculate as Speculate
from saccade.train.tasks.text import Text as Text
from saccade.train.tasks.text import fingerprint as fingerprint
from saccade.train.tasks.text import is_paths as is_paths
from saccade.train.tasks.track import Track as Track

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Text,
        Recall,
        ListOps,
        Digits,
        DigitsCNN,
        PairedViews,
        Fuse,
        Restore,
        Segment,
        Salient,
        Detect,
        Match,
        Recognise,
        Retrieve,
        Look,
        Track,
        Click,
        Localise,
        Caption,
        Explain,
        ExplainCNN,
        Speculate,
    )
}


def taking(part: catalogue.Summary) -> list[type[Task]]:
    """The tasks on which a part can be compared, in the order of the table.

    Args:
        part: of the catalogue.

    >>> from saccade import catalogue
    >>> [task.name for task in taking(catalogue.part("cbam"))]
    ['digits-cnn', 'explain-cnn']
    """
    return [task for task in TASKS.values() if task.takes(part)]
