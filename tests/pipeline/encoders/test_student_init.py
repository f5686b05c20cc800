"""First weights of students: taken from the teacher where asked, in the right places and at the right scale."""

import pytest
import torch
import transformers

from data_prep.errors import UserError
from pipeline.encoders.models import StudentShape, build_student, load_teacher, tail_parameter_names, teacher_config

SIZES = dict(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=34,
    pad_token_id=1,
)
NARROW = StudentShape.parse("2x12", heads=2, feed_forward=24)
SAME = StudentShape(layers=2, hidden=24, heads=4, feed_forward=48)
MODEL_TYPES = ["bert", "roberta", "mpnet", "deberta-v2", "modernbert", "distilbert", "electra", "xlm-roberta-xl"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folders = {}

    def folder(model_type: str) -> str:
        if model_type not in folders:
            extra = {
                "distilbert": dict(hidden_dim=48),
                "electra": dict(embedding_size=24),
                "modernbert": dict(bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2),
            }
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(model_type, **SIZES, **extra.get(model_type, {}))
            model = transformers.AutoModel.from_config(config)
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            folders[model_type] = str(tmp_path_factory.mktemp(model_type))
            model.save_pretrained(folders[model_type])
        return folders[model_type]

    return folder


def student(folder: str, shape: StudentShape, **options):
    return build_student(shape, teacher_config(folder), teacher_model=folder, dropout=0.0, **options).eval()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_slice_of_full_width_is_the_teacher(teachers, model_type):
    folder = teachers(model_type)
    ids = torch.randint(5, 61, (2, 16))
    copy = student(folder, SAME, init="slice:1,2")
    teacher = load_teacher(folder, layer=2)
    for ours, theirs in zip(copy(ids), teacher(ids), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("init", ["embeddings", "slice", "pca"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_narrow_students_start_from_the_teacher_deterministically(teachers, model_type, init):
    folder = teachers(model_type)
    a, b = (student(folder, NARROW, init=init, seed=3).state_dict() for _ in range(2))
    plain = student(folder, NARROW, seed=3).state_dict()
    assert all(torch.equal(a[name], b[name]) and a[name].isfinite().all() for name in a)
    words = next(name for name in a if "word_embeddings" in name or "tok_embeddings" in name)
    changed = {name for name in a if not torch.equal(a[name], plain[name])}
    assert words in changed
    assert init == "embeddings" or any("layer" in name and name.endswith("weight") for name in changed)


def test_slice_thins_every_axis_evenly_and_keeps_the_scale_of_scores(teachers):
    folder = teachers("bert")
    weights = dict(load_teacher(folder, layer=4).backbone.named_parameters())
    narrow_heads = StudentShape.parse("2x12", heads=4, feed_forward=24)
    made = dict(student(folder, narrow_heads, init="slice").backbone.named_parameters())
    torch.testing.assert_close(
        made["embeddings.word_embeddings.weight"], weights["embeddings.word_embeddings.weight"][:, ::2]
    )
    for layer, origin in ((0, 1), (1, 3)):  # spread evenly: layers 2 and 4 of 4
        query, value = (f"encoder.layer.{{}}.attention.self.{name}.weight" for name in ("query", "value"))
        torch.testing.assert_close(made[query.format(layer)], weights[query.format(origin)][::2, ::2] * 2**0.25)
        torch.testing.assert_close(made[value.format(layer)], weights[value.format(origin)][::2, ::2])


def test_pca_keeps_more_of_the_words_than_a_slice(teachers):
    folder = teachers("bert")
    words = "embeddings.word_embeddings.weight"
    table = dict(load_teacher(folder, layer=1).backbone.named_parameters())[words].double()
    similar = table - table.mean(0)
    lost = {}
    for init in ("pca", "slice"):
        made = dict(student(folder, NARROW, init=init).backbone.named_parameters())[words].detach().double()
        made = made - made.mean(0)
        lost[init] = float((similar @ similar.T - made @ made.T).norm())
    assert lost["pca"] < lost["slice"]


def test_a_bert_student_takes_over_a_roberta_teacher(teachers):
    folder = teachers("roberta")
    ids = torch.randint(5, 61, (2, 16))
    copy = student(folder, SAME, family="bert", init="slice:1,2")
    for ours, theirs in zip(copy(ids), load_teacher(folder, layer=2)(ids), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_bert_student_takes_over_any_teachers_words(teachers, model_type):
    folder = teachers(model_type)
    words = "embeddings.word_embeddings.weight"
    plain, taken = (
        dict(student(folder, NARROW, family="bert", init=init).backbone.named_parameters())
        for init in ("random", "embeddings")
    )
    assert not torch.equal(plain[words], taken[words])
    assert torch.equal(plain["encoder.layer.0.output.dense.weight"], taken["encoder.layer.0.output.dense.weight"])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_identity_tail_passes_the_last_layers_input_on(teachers, model_type):
    encoder = student(teachers(model_type), NARROW, tail_init="identity")
    ids = torch.randint(5, 61, (2, 16))
    row, seen = encoder.architecture, []
    last = row.layer_list(encoder.backbone)[-1]
    last.register_forward_pre_hook(lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True)
    output = encoder.backbone(ids).last_hidden_state
    centred = [x - x.mean(-1, keepdim=True) for x in (seen[0], output)]
    assert torch.cosine_similarity(*centred, dim=-1).min() > 0.999
    assert not any(encoder.get_parameter(name).requires_grad for name in tail_parameter_names(encoder))


@pytest.mark.parametrize("init", ["magic", "slice:1", "slice:1,9", "slice:a,b", "random:1,2", "embeddings:1,2"])
def test_unknown_inits_are_refused(teachers, init):
    with pytest.raises(UserError, match="init"):
        student(teachers("bert"), NARROW, init=init)


def test_mistakes_are_explained(teachers):
    with pytest.raises(UserError, match="tail_init"):
        student(teachers("bert"), NARROW, tail_init="magic")
    with pytest.raises(UserError, match="no wider"):
        student(teachers("bert"), StudentShape.parse("2x48", heads=4), init="slice")
    with pytest.raises(UserError, match="no weight"):
        student(teachers("mpnet"), NARROW, family="bert", init="slice")
    with pytest.raises(UserError, match="teacher's weights"):
        build_student(NARROW, teacher_config(teachers("bert")), init="slice")
    with pytest.raises(UserError, match="even width"):
        student(teachers("modernbert"), StudentShape.parse("2x12", heads=4))
