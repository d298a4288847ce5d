"""A chat model of a few thousand hand-set weights that judges by marker words, for `transformers serve`.

One head without content scores looks back with ALiBi: what stands nearer weighs more. Hence the later of `lark` and
`mire` says on which side the lark is, whatever the other words; all of them embed to zero.
"""

from __future__ import annotations

from pathlib import Path

REPLIES = {
    "A": "A",
    "B": "B",
    "TIE": "TIE",
    "NEITHER": "NEITHER",
    "refusal": "I can't help with that.",
    "garbage": "Perhaps",
}
DIM, LAST = 32, 14
# marker word -> (axis, sign) of its embedding; the axes of the replies read them
MARKERS = {
    "lark": (0, 1),
    "mire": (0, -1),
    "dull": (2, 1),
    "soil": (4, 1),
    "taboo": (6, 1),
    "clank": (8, 1),
    "loud": (10, 1),
}
READS = {
    "A": [(0, -1), (10, 1)],
    "B": [(0, 1)],
    "TIE": [(2, 1)],
    "NEITHER": [(4, 1)],
    "refusal": [(6, 1)],
    "garbage": [(8, 1)],
}


def save_tiny_judge(folder: Path) -> Path:
    """Write weights, tokenizer and chat template.

    A prompt with `lark` in one completion and `mire` in the other: the lark's side, in either order. With `dull`: TIE;
    `soil`: NEITHER; `taboo`: a refusal; `clank`: nonsense; `loud`: A, wherever it stands.
    """
    import torch
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "<answer>", *REPLIES.values(), *MARKERS]
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(Regex(r"[^a-z<>]+"), " ")
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %} <answer>",
    )
    config = BloomConfig(
        vocab_size=len(words),
        hidden_size=DIM,
        n_layer=1,
        n_head=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<eos>"],
    )
    model = BloomForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "layernorm.weight" in name or name.endswith("ln_f.weight") else 0.0)

        def axis(i: int, sign: float = 1.0) -> torch.Tensor:
            vector = torch.zeros(DIM)  # mean 0, so that no layer norm moves it
            vector[i], vector[i + 1] = sign, -sign
            return vector

        embedding, head = model.transformer.word_embeddings.weight, model.lm_head.weight
        for word, (i, sign) in MARKERS.items():
            embedding[vocabulary[word]] = axis(i, sign)
        for reply in REPLIES.values():
            embedding[vocabulary[reply]] = axis(LAST)
        attention = model.transformer.h[0].self_attention
        attention.query_key_value.weight[2 * DIM :] = torch.eye(DIM)  # values alone: all scores are the distance's
        attention.dense.weight.copy_(torch.eye(DIM))
        for kind, axes in READS.items():
            head[vocabulary[REPLIES[kind]]] = sum(axis(i, sign) for i, sign in axes)
        head[vocabulary["<unk>"]] = -1e-3 * torch.ones(DIM)
        head[vocabulary["<eos>"]] = 100 * axis(LAST)
    model.generation_config.update(do_sample=False, eos_token_id=vocabulary["<eos>"], pad_token_id=vocabulary["<eos>"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
