"""Teachers and students of every architecture: equal to the full model, truncated, frozen where they should be."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel

from data_prep.errors import UserError
from pipeline.encoders.architectures import ARCHITECTURES, architecture_of, position_limit
from pipeline.encoders.models import (
    RelationEncoder,
    StudentShape,
    build_student,
    load_teacher,
    student_config,
    tail_parameter_names,
    teacher_config,
)
from pipeline.recipes import load_recipe, shipped_recipes
from pipeline.relations.loss import layerwise_relation_loss
from pipeline.training.build import student_shape

LAYERS, VOCABULARY, POSITIONS = 4, 99, 48
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=POSITIONS,
    pad_token_id=1,
)
EXTRA = {
    "distilbert": dict(hidden_dim=32),
    "electra": dict(embedding_size=16),
    "deberta-v2": dict(
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        position_buckets=8,
        position_biased_input=False,
        share_att_key=True,
        type_vocab_size=0,
    ),
    "modernbert": dict(
        local_attention=8, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2, attention_bias=True
    ),
}
SHAPE = StudentShape.parse("2x12", heads=2)


def small_config(model_type: str):
    return transformers.AutoConfig.for_model(model_type, **(SIZES | EXTRA.get(model_type, {})))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a full random model of an architecture, made once each."""
    folders: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in folders:
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(small_config(model_type))
            for parameter in model.parameters():  # norms and biases away from one and zero
                parameter.data += 0.1 * torch.randn_like(parameter)
            folders[model_type] = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folders[model_type])
        return folders[model_type]

    return folder


@pytest.fixture(params=sorted(ARCHITECTURES))
def teacher_folder(request, saved) -> str:
    return str(saved(request.param))


def padded_batch(rows: int = 3, positions: int = 20):
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (rows, positions))
    mask = torch.arange(positions) < torch.tensor([positions, positions - 7, 3])[:rows, None]
    return ids.masked_fill(~mask, 1), mask


def full_model_projections(folder: str, layer: int, ids, mask):
    """What the ordinary model's own projections of a layer give, all layers present."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    row, outputs = architecture_of(model.config), []
    for name in row.projections:
        module = row.layer_list(model)[layer - 1].get_submodule(name)
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        model(ids, attention_mask=None if mask is None else mask.long())
    return outputs[:3] if len(row.projections) == 3 else outputs[0].chunk(3, -1)


@pytest.mark.parametrize("layer", [1, 3, LAYERS])
@pytest.mark.parametrize("padding", [False, True])
def test_teacher_gives_the_full_models_queries_keys_values(teacher_folder, layer, padding):
    ids, mask = padded_batch()
    if not padding:
        ids, mask = ids[:1].expand(3, -1), None
    teacher = load_teacher(teacher_folder, layer=layer)
    ours = teacher(ids, mask)
    for got, expected in zip(ours, full_model_projections(teacher_folder, layer, ids, mask), strict=True):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)


def test_teacher_holds_no_later_layer_and_no_pooler(teacher_folder):
    teacher = load_teacher(teacher_folder, layer=2)
    assert len(teacher.architecture.layer_list(teacher.backbone)) == 2
    assert getattr(teacher.backbone, "pooler", None) is None
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_documents_do_not_see_each_other(teacher_folder):
    teacher = load_teacher(teacher_folder, layer=3)
    first, second = torch.randint(5, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(2))
    packed = torch.cat([first, second])[None]
    positions = torch.arange(10).repeat(2)[None]
    documents = torch.arange(2).repeat_interleave(10)[None]
    together = teacher(packed, position_ids=positions, document_ids=documents)
    for start, document in ((0, first), (10, second)):
        for got, alone in zip(together, teacher(document[None]), strict=True):
            torch.testing.assert_close(got[:, start : start + 10], alone, rtol=1e-4, atol=1e-5)


def test_student_tail_is_exactly_what_gets_no_gradient(teacher_folder):
    for shape in (SHAPE, StudentShape.parse("1x12", heads=2)):
        student = build_student(shape, teacher_config(teacher_folder), dropout=0.0)
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        ids, mask = padded_batch()
        sum(x.square().sum() for x in student(ids, mask)).backward()
        untouched = [name for name, parameter in student.named_parameters() if parameter.grad is None]
        assert untouched == tail_parameter_names(student)


def test_student_has_its_shape_and_dropout(teacher_folder):
    student = build_student(SHAPE, teacher_config(teacher_folder), dropout=0.3)
    ids, mask = padded_batch()
    row, config = student.architecture, student.config
    assert student.training and all(x.shape == (3, 20, 12) for x in student(ids, mask))
    assert len(row.layer_list(student.backbone)) == config.num_hidden_layers == 2
    assert getattr(config, row.feed_forward_size) == 48
    rates = {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3}
    assert not torch.equal(student(ids, mask).query, student(ids, mask).query)
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == tail_parameter_names(student)


def test_student_of_bert_family_keeps_the_teachers_vocabulary_and_positions(teacher_folder):
    config = teacher_config(teacher_folder)
    student = build_student(SHAPE, config, family="bert")
    assert student.config.model_type == "bert"
    assert student.config.vocab_size == config.vocab_size and student.config.pad_token_id == config.pad_token_id
    assert position_limit(student.config) == position_limit(config)
    ids, mask = padded_batch()
    assert student(ids, mask).key.shape == (3, 20, 12)


def test_backbone_is_the_ordinary_model_outside_the_encoder(teacher_folder, tmp_path):
    student = build_student(SHAPE, teacher_config(teacher_folder)).eval()
    ids, mask = padded_batch()
    student(ids, mask)
    student.backbone.save_pretrained(tmp_path)
    reloaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ours = student.backbone(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours, reloaded(ids, attention_mask=mask.long()).last_hidden_state)


def test_student_is_the_same_for_the_same_seed(saved):
    config = teacher_config(str(saved("bert")))
    state = torch.random.get_rng_state()
    a, b, c = (build_student(SHAPE, config, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(
        a["backbone.encoder.layer.0.output.dense.weight"], c["backbone.encoder.layer.0.output.dense.weight"]
    )


def test_a_row_without_real_positions_gives_finite_gradients(saved):
    student = build_student(SHAPE, teacher_config(str(saved("bert"))))
    ids, mask = padded_batch()
    mask[1] = False
    (student(ids, mask).query * mask[..., None]).sum().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["6x", "6-384", "0x384", "6x385", ""])
def test_bad_shape_names_are_refused(name):
    with pytest.raises(UserError):
        StudentShape.parse(name)


def test_paper_shapes():
    assert StudentShape.parse("6x384") == StudentShape(layers=6, hidden=384, heads=12, feed_forward=1536)
    assert StudentShape.parse("3x192", heads=4, feed_forward=100).feed_forward == 100


def test_unknown_architecture_names_the_known_ones(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2.*bert.*xlm-roberta"):
        teacher_config(str(tmp_path))


def test_mistakes_with_teachers_are_explained(saved, tmp_path):
    with pytest.raises(UserError, match="no model in"):
        teacher_config(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="layers 1 to 4"):
        load_teacher(str(saved("bert")), layer=5)
    small_config("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load the weights"):
        load_teacher(str(tmp_path), layer=1)
    transformers.AutoModel.from_config(small_config("roberta")).save_pretrained(tmp_path)
    small_config("bert").save_pretrained(tmp_path)
    bare = transformers.BertModel(small_config("bert"))
    weights = {name: value for name, value in bare.state_dict().items() if "layer.0.attention" not in name}
    bare.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match="lacks .* weights"):
        load_teacher(str(tmp_path), layer=1)


def test_several_layers_at_once(teacher_folder):
    ids, mask = padded_batch()
    together = load_teacher(teacher_folder, layer=[1, 3])(ids, mask)
    for layer, qkv in zip((1, 3), together, strict=True):
        for got, expected in zip(qkv, load_teacher(teacher_folder, layer=layer)(ids, mask), strict=True):
            torch.testing.assert_close(got[mask], expected[mask])
    student = build_student(SHAPE, teacher_config(teacher_folder), layers=[1, 2])
    loss = layerwise_relation_loss(together, student(ids, mask), weights=[0.5, 2.0], heads=2, mask=mask)
    loss.total.backward()
    assert set(loss.per_pair) == {"1.qq", "1.kk", "1.vv", "2.qq", "2.kk", "2.vv"}
    expected = sum((0.5 if name[0] == "1" else 2.0) * value for name, value in loss.per_pair.items())
    torch.testing.assert_close(loss.total.detach(), expected)


def test_layers_that_make_no_sense_are_refused(saved):
    for layers in ([3, 1], [2, 2], [], [0, 1]):
        with pytest.raises(UserError):
            load_teacher(str(saved("bert")), layer=layers)
    with pytest.raises(UserError, match="end with the last"):
        build_student(SHAPE, teacher_config(str(saved("bert"))), layers=[1])


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "deberta-v2"])
def test_compiled_layers_give_the_same(saved, model_type):
    student = build_student(SHAPE, teacher_config(str(saved(model_type))), dropout=0.0)
    ids, mask = padded_batch()

    def run():
        student.zero_grad()
        outputs = student(ids, mask)
        sum((x * mask[..., None]).square().sum() for x in outputs).backward()
        return [x[mask] for x in outputs] + [p.grad for p in student.parameters() if p.grad is not None]

    expected = [x.clone() for x in run()]
    student.compile_layers(backend="aot_eager")
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_teacher_loads_in_the_asked_precision(saved):
    teacher = load_teacher(str(saved("bert")), layer=2, dtype=torch.bfloat16)
    ids, mask = padded_batch()
    assert isinstance(teacher, RelationEncoder) and teacher(ids, mask).value.dtype == torch.bfloat16


def test_convolution_of_deberta_is_tail_when_nothing_follows_it_and_refused_inside_documents():
    config = small_config("deberta-v2")
    config.conv_kernel_size, config.conv_act = 3, "gelu"
    ids = torch.randint(5, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    for layers, is_tail in ((1, True), (2, False)):
        student = build_student(StudentShape.parse(f"{layers}x12", heads=2), config, dropout=0.0)
        conv = [name for name, _ in student.named_parameters() if ".conv." in name]
        assert conv and (set(conv) <= set(tail_parameter_names(student))) == is_tail
        sum(x.sum() for x in student(ids)).backward()
        missing = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
        assert not [name for name in missing if ".conv." in name]
    with pytest.raises(UserError, match="lets documents of a window see each other"):
        student(ids, document_ids=torch.zeros_like(ids))


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_activations_are_computed_again_or_that_is_refused(model_type):
    student = build_student(SHAPE, small_config(model_type), dropout=0.0)
    if model_type == "mpnet":
        with pytest.raises(UserError, match="mpnet models cannot compute their activations again"):
            student.checkpoint_activations()
        return
    ids = torch.randint(5, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    before = [x.detach() for x in student(ids)]
    student.checkpoint_activations()
    after = student(ids)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(after, before, strict=True))
    sum(x.sum() for x in after).backward()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_layers_may_be_watched():
    """Several layers compared: those whose projections are looked at run as they are."""
    torch._dynamo.reset()
    ids = torch.randint(5, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    student = build_student(StudentShape.parse("4x12", heads=2), small_config("bert"), dropout=0.0, layers=[2, 4])
    student.eval()
    expected = student(ids)
    began = graphs()
    student.compile_layers(backend="eager")
    for ours, theirs in zip(student(ids), expected, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    assert graphs() > began


def test_one_compiled_form_serves_batches_of_any_length():
    torch._dynamo.reset()
    student = build_student(StudentShape.parse("3x12", heads=2), small_config("bert"), dropout=0.0).eval()
    lengths = (9, 17, 12, 31, 33, 7, 21, 40, 8, 13, 26, 39)
    batches = []
    for number, length in enumerate(lengths):
        ids = torch.randint(5, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(number))
        batches.append((ids, torch.arange(length) < torch.tensor([length, 5])[:, None] if number % 3 else None))
    with torch.no_grad():
        expected = [student(ids, mask) for ids, mask in batches]
        student.compile_layers(ragged=True, backend="eager")
        student(*batches[0])
        began = graphs()
        for (ids, mask), theirs in zip(batches, expected, strict=True):
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            for a, b in zip(student(ids, mask), theirs, strict=True):
                torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)
    assert graphs() - began <= 1


TEACHERS = {  # what decides the number of parameters of the paper's teachers
    "bert-base": ("bert", dict(vocab_size=30522)),
    "bert-large": ("bert", dict(vocab_size=30522)),
    "roberta-large": ("roberta", dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
    "xlmr-large": ("xlm-roberta", dict(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1)),
}
PUBLISHED = {  # millions, of the students that the authors have put out
    "roberta-large-6x768": 81,
    "roberta-large-12x384": 41,
    "roberta-large-6x384": 30,
    "bert-large-6x768": 66,
    "bert-large-6x384": 22,
    "bert-base-6x768": 66,
    "bert-base-6x384": 22,
    "xlmr-large-12x384": 117,
    "xlmr-large-6x384": 107,
}


def test_all_published_students_have_a_recipe():
    assert PUBLISHED.keys() == set(shipped_recipes()) - {"demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_students_of_the_recipes_have_the_published_sizes(name):
    recipe = load_recipe(name)
    kind, sizes = TEACHERS[name.rpartition("-")[0]]
    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    teacher = AutoConfig.for_model(kind, **sizes, **(large if "large" in name else {}))
    assert recipe.teacher.layer <= teacher.num_hidden_layers and teacher.hidden_size % recipe.relations.heads == 0
    config = student_config(student_shape(recipe), teacher, family=recipe.student.family, dropout=0.1)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModel.from_config(config, add_pooling_layer=False).parameters())
    assert abs(count / 1e6 - PUBLISHED[name]) < 1
