"""The one table of what is replaced, and for which versions of the host. A new model of a known
shape is one row.
"""

from __future__ import annotations

from eet_patch.adapters import (
    bert,
    gpt2,
    gpt2_beam,
    gpt2_lm_head,
    gpt2_sample,
    gpt_bigcode,
    gpt_neo,
    opt,
)
from eet_patch.patching import PatchTarget

TRANSFORMERS = "transformers>=4.56,<5.24"

_BERT_FAMILY = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "ernie": "Ernie",
    "data2vec": "Data2VecText",
    "bert_generation": "BertGeneration",
    "roc_bert": "RoCBert",
}
_FILES = {"data2vec": "modeling_data2vec_text"}

TARGETS: tuple[PatchTarget, ...] = (
    *(
        PatchTarget(
            name=f"{folder}_layer",
            module=f"transformers.models.{folder}.{_FILES.get(folder, f'modeling_{folder}')}",
            attribute=f"{prefix}Layer.forward",
            requires=TRANSFORMERS,
            adapter=bert.adapter,
        )
        for folder, prefix in _BERT_FAMILY.items()
    ),
    PatchTarget(
        name="gpt2_block",
        module="transformers.models.gpt2.modeling_gpt2",
        attribute="GPT2Block.forward",
        requires=TRANSFORMERS,
        adapter=gpt2.adapter,
    ),
    PatchTarget(
        name="decision_transformer_block",
        module="transformers.models.decision_transformer.modeling_decision_transformer",
        attribute="DecisionTransformerGPT2Block.forward",
        requires=TRANSFORMERS,
        adapter=gpt2.adapter,
    ),
    PatchTarget(
        name="opt_layer",
        module="transformers.models.opt.modeling_opt",
        attribute="OPTDecoderLayer.forward",
        requires=TRANSFORMERS,
        adapter=opt.adapter,
    ),
    PatchTarget(
        name="gpt_neo_block",
        module="transformers.models.gpt_neo.modeling_gpt_neo",
        attribute="GPTNeoBlock.forward",
        requires=TRANSFORMERS,
        adapter=gpt_neo.adapter,
    ),
    PatchTarget(
        name="gpt_bigcode_block",
        module="transformers.models.gpt_bigcode.modeling_gpt_bigcode",
        attribute="GPTBigCodeBlock.forward",
        requires=TRANSFORMERS,
        adapter=gpt_bigcode.adapter,
    ),
    PatchTarget(
        name="gpt2_lm_head",
        module="transformers.models.gpt2.modeling_gpt2",
        attribute="GPT2LMHeadModel.forward",
        requires=TRANSFORMERS,
        adapter=gpt2_lm_head.adapter,
    ),
    PatchTarget(
        name="gpt2_sample",
        module="transformers.models.gpt2.modeling_gpt2",
        attribute="GPT2LMHeadModel._sample",
        requires=TRANSFORMERS,
        adapter=gpt2_sample.adapter,
        level="loop",
    ),
    PatchTarget(
        name="gpt2_beam_search",
        module="transformers.models.gpt2.modeling_gpt2",
        attribute="GPT2LMHeadModel._beam_search",
        requires=TRANSFORMERS,
        adapter=gpt2_beam.adapter,
        level="loop",
    ),
)
