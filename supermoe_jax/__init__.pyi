from supermoe_jax.api.data import inspect as inspect
from supermoe_jax.api.data import load_config as load_config
from supermoe_jax.api.data import prepare as prepare
from supermoe_jax.api.embeddings import Embeddings as Embeddings
from supermoe_jax.api.embeddings import ProbeReport as ProbeReport
from supermoe_jax.api.embeddings import neighbors as neighbors
from supermoe_jax.api.embeddings import probe as probe
from supermoe_jax.api.runs import Evaluation as Evaluation
from supermoe_jax.api.runs import Run as Run
from supermoe_jax.api.runs import train as train
from supermoe_jax.embeddings.embedding_files import read_embeddings as read_embeddings
from supermoe_jax.errors import ConfigError as ConfigError
from supermoe_jax.errors import DataError as DataError
from supermoe_jax.errors import RunError as RunError
from supermoe_jax.errors import SimulationError as SimulationError
from supermoe_jax.errors import Stopped as Stopped
from supermoe_jax.errors import StudyError as StudyError
from supermoe_jax.errors import SupermoeError as SupermoeError
from supermoe_jax.serving.loader import load_encoder as load_encoder

__version__: str
