from trmt.api import average as average
from trmt.api import train as train
from trmt.averaging import AverageOptions as AverageOptions
from trmt.errors import TrmtError as TrmtError
from trmt.scoring import ScoreOptions as ScoreOptions
from trmt.scoring import score as score
from trmt.sets.preparing import PrepareOptions as PrepareOptions
from trmt.sets.preparing import prepare as prepare
from trmt.text.tokenizer import Tokenizer as Tokenizer
from trmt.text.tokenizer_training import TokenizerOptions as TokenizerOptions
from trmt.text.tokenizer_training import train_tokenizer as train_tokenizer
from trmt.training.planning import TrainOptions as TrainOptions
from trmt.translating import TranslateOptions as TranslateOptions
from trmt.translating import Translator as Translator

__version__: str
