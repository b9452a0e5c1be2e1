"""The one table of what is replaced, and for which versions of the host. A new model of a known
shape is one row.
"""

from __future__ import annotations

from functools import partial

from eet_patch.adapters import (
    beam_search,
    bert,
    bert_encoder,
    bert_model,
    encoder,
    fairseq_decoder,
    fairseq_encoder,
    fairseq_search,
    fairseq_whole_encoder,
    gpt2,
    gpt2_lm_head,
    gpt_bigcode,
    gpt_neo,
    named_encoder,
    opt,
    sample,
)
from eet_patch.patching import PatchTarget

TRANSFORMERS = "transformers>=4.56,<5.24"
# The version that ve-fairseq 0.12.3 gives itself; its models build the *Base classes.
FAIRSEQ = "fairseq>=0.12.3,<0.13"

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
_ENCODERS = {"bert_generation": "BertEncoder"}  # BertGenerationEncoder is the model

_LOOPS = {
    "gpt2": ("GPT2LMHeadModel", gpt2.LOOP),
    "opt": ("OPTForCausalLM", opt.LOOP),
    "gpt_neo": ("GPTNeoForCausalLM", gpt_neo.LOOP),
}

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
    *(
        PatchTarget(
            name=f"{folder}_encoder",
            module=f"transformers.models.{folder}.{_FILES.get(folder, f'modeling_{folder}')}",
            attribute=f"{_ENCODERS.get(folder, f'{prefix}Encoder')}.forward",
            requires=TRANSFORMERS,
            adapter=partial(encoder.adapter, bert_encoder.kind(f"{prefix}Layer")),
            level="step",
        )
        for folder, prefix in _BERT_FAMILY.items()
    ),
    *(
        PatchTarget(
            name=f"{folder}_encoder",
            module=f"transformers.models.{folder}.modeling_{folder}",
            attribute=f"{cls}.forward",
            requires=TRANSFORMERS,
            adapter=partial(encoder.adapter, kind),
        )
        for folder, cls, kind in (
            ("distilbert", "Transformer", named_encoder.DISTILBERT_KIND),
            ("albert", "AlbertTransformer", named_encoder.ALBERT_KIND),
        )
    ),
    *(
        PatchTarget(
            name=f"{folder}_model",
            module=f"transformers.models.{folder}.{_FILES.get(folder, f'modeling_{folder}')}",
            attribute=f"{_BERT_FAMILY[folder]}Model.forward",
            requires=TRANSFORMERS,
            adapter=bert_model.adapter,
            level="step",
        )
        for folder in ("bert", "roberta", "xlm_roberta", "camembert", "data2vec")
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
    *(
        PatchTarget(
            name=name,
            module=f"transformers.models.{folder}.modeling_{folder}",
            attribute=f"{cls}.forward",
            requires=TRANSFORMERS,
            adapter=adapter,
        )
        for name, folder, cls, adapter in (
            ("opt_layer", "opt", "OPTDecoderLayer", opt.adapter),
            ("gpt_neo_block", "gpt_neo", "GPTNeoBlock", gpt_neo.adapter),
            ("gpt_bigcode_block", "gpt_bigcode", "GPTBigCodeBlock", gpt_bigcode.adapter),
        )
    ),
    PatchTarget(
        name="gpt2_lm_head",
        module="transformers.models.gpt2.modeling_gpt2",
        attribute="GPT2LMHeadModel.forward",
        requires=TRANSFORMERS,
        adapter=gpt2_lm_head.adapter,
    ),
    *(
        PatchTarget(
            name=f"{folder}_{search.removeprefix('_')}",
            module=f"transformers.models.{folder}.modeling_{folder}",
            attribute=f"{cls}.{search}",
            requires=TRANSFORMERS,
            adapter=partial(loop.adapter, kind),
            level="loop",
        )
        for folder, (cls, kind) in _LOOPS.items()
        for search, loop in (("_sample", sample), ("_beam_search", beam_search))
    ),
    PatchTarget(
        name="fairseq_encoder_layer",
        module="fairseq.modules.transformer_layer",
        attribute="TransformerEncoderLayerBase.forward",
        requires=FAIRSEQ,
        adapter=fairseq_encoder.adapter,
    ),
    PatchTarget(
        name="fairseq_encoder",
        module="fairseq.models.transformer.transformer_encoder",
        attribute="TransformerEncoderBase.forward_scriptable",
        requires=FAIRSEQ,
        adapter=fairseq_whole_encoder.adapter,
        level="step",
    ),
    PatchTarget(
        name="fairseq_decoder_layer",
        module="fairseq.modules.transformer_layer",
        attribute="TransformerDecoderLayerBase.forward",
        requires=FAIRSEQ,
        adapter=fairseq_decoder.adapter,
    ),
    PatchTarget(
        name="fairseq_search",
        module="fairseq.sequence_generator",
        attribute="SequenceGenerator._generate",
        requires=FAIRSEQ,
        adapter=fairseq_search.adapter,
        level="loop",
    ),
)
