"""The model-level API: the classes that EET's users know, as modules over `eet_patch.ops`.

Each is made `from_torch(module)`, which shares the parameters of the host's module, or, the whole
models, `from_pretrained(path)`. They are for inference, need no maximal batch or length, and need
transformers or fairseq only to load a model and to return the host's output classes.
"""

from eet_patch.models.bert import (
    EETBertAttention,
    EETBertEmbedding,
    EETBertEncoder,
    EETBertEncoderLayer,
    EETBertFeedforward,
    EETBertModel,
)
from eet_patch.models.cache import KVCache, LayerCache
from eet_patch.models.fairseq_decoder import (
    EETTransformerAttention,
    EETTransformerDecoder,
    EETTransformerDecoderLayer,
    EETTransformerEmbedding,
    EETTransformerFeedforward,
    EETTransformerLayerNorm,
)
from eet_patch.models.gpt2 import (
    EETGPT2Attention,
    EETGPT2Decoder,
    EETGPT2DecoderLayer,
    EETGPT2Embedding,
    EETGPT2Feedforward,
    EETGPT2Model,
    EETLayerNorm,
)

__all__ = [
    "EETBertAttention",
    "EETBertEmbedding",
    "EETBertEncoder",
    "EETBertEncoderLayer",
    "EETBertFeedforward",
    "EETBertModel",
    "EETGPT2Attention",
    "EETGPT2Decoder",
    "EETGPT2DecoderLayer",
    "EETGPT2Embedding",
    "EETGPT2Feedforward",
    "EETGPT2Model",
    "EETLayerNorm",
    "EETTransformerAttention",
    "EETTransformerDecoder",
    "EETTransformerDecoderLayer",
    "EETTransformerEmbedding",
    "EETTransformerFeedforward",
    "EETTransformerLayerNorm",
    "KVCache",
    "LayerCache",
]
