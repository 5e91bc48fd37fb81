"Each loss equals sentence-transformers' own, or the formula of the seed written out in float64, in value and gradient; and nothing breaks it."
import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim, pairwise_angle_sim, pairwise_cos_sim

from nixietune.core import InputError
from nixietune.losses import BatchKL, Contrastive, CoSENT, Cosine, grades, InfoNCE, KL, M3KD, MarginMSE, Triplet
from nixietune.objectives import Objective
from nixietune.relation import NEG, OWN, POS, Relation, SKIP
from nixietune.similarities import SIMILARITIES

NAN = float("nan")


def pairs(n=24, dim=10, seed=0, labels=None, dtype=torch.float64):
    "Queries with a document each, and a label for each pair."
    g = torch.Generator().manual_seed(seed)
    q, d = (torch.randn(n, dim, generator=g, dtype=dtype).requires_grad_() for _ in "qd")
    label = torch.rand(n, generator=g) if labels is None else torch.randint(0, 2, (n,), generator=g).float()
    kind = torch.full((n,), SKIP) if labels is None else torch.where(label == 1, POS, OWN)
    return q, d, label, batch_of(torch.arange(n), torch.arange(n), kind, label if labels is None else None, n=n)


def batch_of(rows, cols, kind, score=None, teacher=None, n=None):
    e = len(rows)
    return {"q_id": torch.arange(n), "d_id": torch.arange(int(cols.max()) + 1), "edges": torch.stack([rows, cols]), "kind": kind.to(torch.int8),
        "score": torch.full((e,), NAN) if score is None else score, "teacher": torch.full((e,), NAN) if teacher is None else teacher,
        "known": torch.zeros(2, 0, dtype=torch.int64)}


def groups(n=8, negatives=3, dim=10, seed=0):
    "Queries with a positive and negatives of their own, and a teacher's score for each; documents in the order pos, neg, neg, ..."
    g = torch.Generator().manual_seed(seed)
    q, *columns = (torch.randn(n, dim, generator=g, dtype=torch.float64).requires_grad_() for _ in range(negatives + 2))
    k = negatives + 1
    rows = torch.arange(n).repeat_interleave(k)
    kind = torch.tensor([POS] + [OWN] * negatives).repeat(n)
    teacher = torch.rand(n, k, generator=g, dtype=torch.float32) * 8
    return q, columns, teacher, batch_of(rows, torch.arange(n * k), kind, teacher=teacher.flatten(), n=n)


def ours(loss, q, d, batch, precise=True):
    "The loss of a step, computed in float64 so that only formulas are compared."
    from nixietune.relation import relate
    relation = relate(batch, loss.view)
    terms = loss(SIMILARITIES[loss.similarity](q, d, relation.cols), relation)
    return (terms.value * terms.weight).sum() / len(batch["q_id"])


def same(mine, other, *leaves, tolerance=1e-6):
    assert mine.item() == pytest.approx(other.item(), abs=tolerance, rel=tolerance)
    for a, b in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(other, leaves)):
        assert torch.allclose(a, b, atol=tolerance, rtol=1e-5) and b.abs().sum() > 0


def loss_of(name, **options): return getattr(theirs, name)(model=None, **options)


def test_cosine():
    q, d, label, batch = pairs()
    same(ours(Cosine(), q, d, batch), loss_of("CosineSimilarityLoss").compute_loss_from_embeddings([q, d], label.double()), q, d)


@pytest.mark.parametrize("labels", [None, "classes"])
def test_contrastive(labels):
    q, d, label, batch = pairs(labels=labels)
    same(ours(Contrastive(), q, d, batch), loss_of("ContrastiveLoss").compute_loss_from_embeddings([q, d], label), q, d)


@pytest.mark.parametrize("seed", range(4))
def test_online_contrastive(seed):
    "Theirs is the sum over the batch, ours divided by its queries."
    q, d, label, batch = pairs(labels="classes", seed=seed)
    same(ours(Contrastive(online=True), q, d, batch) * len(q), loss_of("OnlineContrastiveLoss").compute_loss_from_embeddings([q, d], label), q, d)


def test_online_contrastive_with_one_kind():
    for wanted in (0, 1):
        q, d, label, batch = pairs(labels="classes")
        batch["kind"] = torch.full_like(batch["kind"], POS if wanted else OWN)
        same(ours(Contrastive(online=True, margin=1.5), q, d, batch) * len(q),
            loss_of("OnlineContrastiveLoss", margin=1.5).compute_loss_from_embeddings([q, d], torch.full_like(label, wanted)), q, d)


@pytest.mark.parametrize("similarity, metric, margin", [("euclidean", "EUCLIDEAN", 5.0), ("cos", "COSINE", 0.4)])
def test_triplet(similarity, metric, margin):
    from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric
    q, (p, n), _, batch = groups(negatives=1)
    d = torch.stack([p, n], 1).flatten(0, 1)
    other = loss_of("TripletLoss", distance_metric=getattr(TripletDistanceMetric, metric), triplet_margin=margin)
    same(ours(Triplet(margin, similarity=similarity), q, d, batch), other.compute_loss_from_embeddings([q, p, n], None), q, p, n, tolerance=1e-5)


@pytest.mark.parametrize("labels", [None, "classes"])
@pytest.mark.parametrize("name, similarity", [("CoSENTLoss", "cos"), ("AnglELoss", "angle")])
def test_cosent_and_angle(labels, name, similarity):
    q, d, label, batch = pairs(labels=labels)
    same(ours(CoSENT(similarity=similarity), q, d, batch), loss_of(name).compute_loss_from_embeddings([q, d], label), q, d)


def test_cosent_with_equal_grades_has_nothing_to_learn():
    q, d, _, batch = pairs()
    loss = ours(CoSENT(), q, d, batch | {"score": torch.full((24,), 0.5)})
    assert loss.item() == 0 and not any(o.any() for o in torch.autograd.grad(loss, (q, d)))


@pytest.mark.parametrize("negatives", [1, 3])
def test_margin_mse(negatives):
    q, columns, teacher, batch = groups(negatives=negatives)
    d = torch.stack(columns, 1).flatten(0, 1)
    same(ours(MarginMSE(), q, d, batch), loss_of("MarginMSELoss").compute_loss_from_embeddings([q, *columns], teacher.double()), q, *columns, tolerance=1e-5)


@pytest.mark.parametrize("student, teacher_temperature", [(1.0, 1.0), (0.5, 2.0)])
def test_kl(student, teacher_temperature):
    "Theirs is multiplied by the square of the student's temperature."
    q, columns, teacher, batch = groups()
    d = torch.stack(columns, 1).flatten(0, 1)
    other = loss_of("DistillKLDivLoss", similarity_fct=pairwise_cos_sim, student_temperature=student, teacher_temperature=teacher_temperature)
    same(ours(KL(student, teacher_temperature), q, d, batch) * student**2, other.compute_loss_from_embeddings([q, *columns], teacher.double()), q, *columns)


def test_kl_as_in_flagembedding():
    "kl_div: InfoNCE over the batch and the cross-entropy to the teacher over the group, both at one temperature, added up."
    q, columns, teacher, batch = groups()
    d, tau, k = torch.stack(columns, 1).flatten(0, 1), 0.02, 4
    scores = cos_sim(q, d) / tau
    local = torch.stack([scores[i, i * k:(i + 1) * k] for i in range(len(q))])
    wanted = -(teacher.double().softmax(1) * local.log_softmax(1)).sum(1).mean() + torch.nn.functional.cross_entropy(scores, torch.arange(len(q)) * k)
    same(ours(KL(tau, entropy=False), q, d, batch) + ours(InfoNCE(tau), q, d, batch), wanted, q, *columns)
    both = Objective([InfoNCE(tau), KL(tau, entropy=False)])
    found = sum((o.value * o.weight).sum() / len(q) for o in both(q.float(), d.float(), batch).values())
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_batch_kl_as_in_rag_retrieval():
    q, d, label, batch = pairs()
    batch |= {"teacher": label, "score": torch.full_like(label, NAN)}
    target = (label.double() / 0.02).softmax(0)
    wanted = (target * (target.log() - (pairwise_cos_sim(q, d) / 0.02).log_softmax(0))).sum() / len(q)
    same(ours(BatchKL(), q, d, batch), wanted, q, d)


# ---- what every loss does

LOSSES = [InfoNCE(), InfoNCE(in_batch=False), InfoNCE(in_batch="negatives", leave_out=0.05), InfoNCE(weighted=True),
    InfoNCE(positives="together", weighted=True), InfoNCE(directions=("query_to_doc", "doc_to_query"), partition="per_direction"), Cosine(), Contrastive(), Contrastive(online=True), Triplet(), Triplet(0.3, True, "cos"), CoSENT(),
    CoSENT(similarity="angle"), KL(), BatchKL(), MarginMSE(), M3KD(), M3KD(in_batch=False)]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def mixed(seed=0, n=5):
    "Groups with everything: grades here and there, a teacher here and there, documents that are left out."
    g = torch.Generator().manual_seed(seed)
    q, d = (torch.randn(m, 6, generator=g, dtype=torch.float64) for m in (n, 3 * n))
    rows = torch.arange(n).repeat_interleave(3)
    kind = torch.tensor([POS, OWN, SKIP]).repeat(n)
    some = lambda: torch.where(torch.rand(3 * n, generator=g) < 0.7, torch.rand(3 * n, generator=g), NAN)
    return q, d, batch_of(rows, torch.arange(3 * n), kind, some(), some(), n=n)


@each_loss
def test_gradients(loss):
    q, d, batch = mixed()
    assert torch.autograd.gradcheck(lambda q, d: ours(loss, q, d, batch), (q.requires_grad_(), d.requires_grad_()), atol=1e-5)


@each_loss
def test_order_does_not_matter(loss):
    torch.manual_seed(0)
    q, d, batch = mixed()
    new_q, new_d, edges = torch.randperm(len(q)), torch.randperm(len(d)), torch.randperm(15)
    if isinstance(loss, M3KD): edges = torch.arange(15)  # here the order within a group is a part of the formula
    place_q, place_d = new_q.argsort(), new_d.argsort()
    moved = {k: v[edges] for k, v in batch.items() if k in ("kind", "score", "teacher")} | {"q_id": batch["q_id"], "d_id": batch["d_id"], "known": batch["known"],
        "edges": torch.stack([place_q[batch["edges"][0]], place_d[batch["edges"][1]]])[:, edges]}
    assert ours(loss, q[new_q], d[new_d], moved).item() == pytest.approx(ours(loss, q, d, batch).item(), rel=1e-5)


def hard_cases():
    one = torch.randn(1, 6)
    yield "one query, one document", one, torch.randn(1, 6), batch_of(torch.tensor([0]), torch.tensor([0]), torch.tensor([POS]), n=1)
    yield "one query, its own vector", one, one.clone(), batch_of(torch.tensor([0]), torch.tensor([0]), torch.tensor([POS]), torch.tensor([1.0]), torch.tensor([1.0]), n=1)
    yield "all left out", torch.randn(2, 6), torch.randn(2, 6), batch_of(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([SKIP, SKIP]), n=2)
    yield "negatives only", torch.randn(2, 6), torch.randn(2, 6), batch_of(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([OWN, OWN]), n=2)
    yield "no documents of its own", torch.randn(2, 6), torch.randn(1, 6), batch_of(torch.tensor([0]), torch.tensor([0]), torch.tensor([POS]), n=2)
    yield "all the same", torch.ones(3, 6), torch.ones(6, 6), batch_of(torch.arange(3).repeat_interleave(2), torch.arange(6), torch.tensor([POS, OWN] * 3), teacher=torch.ones(6), n=3)
    yield "zero vectors", torch.zeros(2, 6), torch.zeros(4, 6), batch_of(torch.arange(2).repeat_interleave(2), torch.arange(4), torch.tensor([POS, OWN] * 2), teacher=torch.arange(4.0), n=2)


@each_loss
@pytest.mark.parametrize("case", [*hard_cases()], ids=lambda o: o[0])
def test_nothing_breaks_it(loss, case):
    "The loss and the gradient are numbers, in float32 and in half precision, at a small temperature too."
    from dataclasses import replace
    small = replace(loss, temperature=0.001) if hasattr(loss, "temperature") else loss
    _, q, d, batch = case
    for one in (loss, small):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = (o.to(dtype).clone().requires_grad_() for o in (q, d))
            terms = next(iter(Objective(one)(a, b, batch).values()))
            total = (terms.value * terms.weight).sum()
            total.backward()
            assert total.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all(), (one, dtype)
            assert (terms.weight >= 0).all() and (terms.value.isfinite()).all()


def test_grades():
    "The user's score first, then 1 and 0; scored documents count, left-out ones do not."
    relation = Relation(torch.tensor([[POS, POS, OWN, OWN, SKIP, SKIP, NEG]], dtype=torch.int8), torch.tensor([[NAN, 2.0, NAN, 0.5, 0.7, NAN, NAN]]), None)
    grade, counted = grades(relation)
    assert grade[counted].tolist() == pytest.approx([1, 2, 0, 0.5, 0.7]) and counted.sum() == 5


# ---- InfoNCE in every configuration that sentence-transformers has, too

DIRECTIONS = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
SETS = [DIRECTIONS[:1], [DIRECTIONS[0], DIRECTIONS[2]], DIRECTIONS[:2], [DIRECTIONS[0], DIRECTIONS[3]], DIRECTIONS]


def with_blocks(loss, q, d, batch):
    from nixietune.losses import Blocks
    from nixietune.relation import relate
    similarity, relation = SIMILARITIES[loss.similarity], relate(batch, loss.view)
    terms = loss(Blocks(similarity(q, d), similarity(q, q), similarity(d[relation.positives[1]], d)), relation)
    return (terms.value * terms.weight).sum() / len(q)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
@pytest.mark.parametrize("directions", SETS, ids="+".join)
@pytest.mark.parametrize("hardness", [0.0, 2.0])
def test_mnrl(negatives, partition, directions, hardness):
    if partition == "per_direction" and {*directions} & {"query_to_query", "doc_to_doc"}:  # they refuse it, too
        with pytest.raises(InputError, match="directions that hold the positive"): InfoNCE(directions=tuple(directions), partition=partition)
        return
    q, columns, _, batch = groups(negatives=negatives)
    d = torch.stack(columns, 1).flatten(0, 1)
    other = loss_of("MultipleNegativesRankingLoss", scale=1 / 0.07, directions=tuple(directions), partition_mode=partition,
        hardness_mode="all_negatives", hardness_strength=hardness)
    mine = with_blocks(InfoNCE(0.07, directions=tuple(directions), partition=partition, hardness=hardness), q, d, batch)
    same(mine, other.compute_loss_from_embeddings([q, *columns], None), q, *columns)


@pytest.mark.parametrize("which, theirs_name", [("own", "hard_negatives"), ("in_batch", "in_batch_negatives"), ("all", "all_negatives")])
def test_hardness(which, theirs_name):
    q, columns, _, batch = groups()
    d = torch.stack(columns, 1).flatten(0, 1)
    other = loss_of("MultipleNegativesRankingLoss", hardness_mode=theirs_name, hardness_strength=5.0)
    same(ours(InfoNCE(0.05, hardness=5.0, hard_ones=which), q, d, batch), other.compute_loss_from_embeddings([q, *columns], None), q, *columns)


def test_the_seeds_negatives():
    "nixietune's unpaired, paired and positives only, and RAG-Retrieval's triplets, written out."
    q, columns, _, batch = groups()
    tau, k, n = 0.05, 4, 8
    zero, negative = torch.zeros(n, dtype=torch.int64), [c for c in range(n * k) if c % k]
    seeds = {
        "negatives": lambda s: (torch.cat([s[:, ::k].diagonal()[:, None], s[:, negative]], 1), zero),
        False: lambda s: (torch.stack([s[i, i * k:(i + 1) * k] for i in range(n)]), zero),
        "positives": lambda s: (s[:, ::k], torch.arange(n)),
    }
    for in_batch, written_out in seeds.items():
        d, d_again = (torch.stack(columns, 1).flatten(0, 1) for _ in range(2))
        wanted = torch.nn.functional.cross_entropy(*written_out(cos_sim(q, d_again) / tau))
        same(ours(InfoNCE(tau, in_batch), q, d, batch), wanted, q, *(columns if in_batch != "positives" else columns[:1]))


def test_directions_know_what_is_known():
    "A query with the same known answer is no negative in any direction: its gradient there is exactly zero."
    q, columns, _, batch = groups(negatives=0)
    batch["known"] = torch.tensor([[1], [0]])  # document 0 answers query 1, too
    s, qq, dd = (torch.randn(8, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    from nixietune.losses import Blocks
    from nixietune.relation import relate
    value = InfoNCE(directions=tuple(DIRECTIONS))(Blocks(s, qq, dd), relate(batch)).value.sum()
    gs, gq, gd = torch.autograd.grad(value, (s, qq, dd))
    assert gs[1, 0] == 0 and gq[0, 1] == 0 and not gq.diagonal().any() and gd[1, 0] == 0 and not gd.diagonal().any()
    assert (gs != 0).sum() == 63 and gq[1, 0] != 0 and gd[0, 1] != 0


def test_all_equal():
    "Values that follow from the formulas when all vectors are the same."
    n, k = 6, 4
    q, columns, teacher, batch = groups(n=n)
    q, d = torch.ones(n, 5, dtype=torch.float64), torch.ones(n * k, 5, dtype=torch.float64)
    log = lambda x: torch.log(torch.tensor(float(x))).item()
    for loss, wanted in ((InfoNCE(), log(n * k)), (InfoNCE(in_batch=False), log(k)), (InfoNCE(in_batch="negatives"), log(1 + n * (k - 1))),
        (InfoNCE(in_batch="positives"), log(n)), (Triplet(0.3, similarity="cos"), 0.3), (Cosine(), (k - 1) / k)):
        assert ours(loss, q, d, batch).item() == pytest.approx(wanted, abs=1e-6), loss


# ---- M3's distillation

@pytest.mark.parametrize("in_batch", [True, False])
def test_m3_kd(in_batch):
    "FlagEmbedding's formula: member after member, with the members before it masked out of its own group."
    q, columns, teacher, batch = groups()
    d, d_again = (torch.stack(columns, 1).flatten(0, 1) for _ in range(2))
    n, k, tau = 8, 4, 0.05
    t, scores, wanted = teacher.double().softmax(1), cos_sim(q, d_again) / tau, 0
    if not in_batch: scores = torch.stack([scores[i, i * k:(i + 1) * k] for i in range(n)])
    for member in range(k):
        masked = scores.clone()
        for i in range(n): masked[i, (i * k if in_batch else 0):(i * k if in_batch else 0) + member] = -torch.inf
        target = torch.arange(n) * k + member if in_batch else torch.full((n,), member)
        wanted = wanted + (t[:, member] * torch.nn.functional.cross_entropy(masked, target, reduction="none")).mean()
    from nixietune.relation import relate
    loss = M3KD(tau, in_batch=in_batch)
    relation = relate(batch, loss.view)
    terms = loss(SIMILARITIES["cos"](q, d, relation.cols), relation)
    same((terms.value * terms.weight).sum() / n, wanted, q, *columns)
    found = Objective(loss)(q.float(), d.float(), batch)["M3KD"]
    assert found.mean().item() == pytest.approx(wanted.item(), rel=1e-4)


def test_m3_kd_with_missing_scores():
    "A document without a score takes no part; a query without any has weight 0."
    q, columns, teacher, batch = groups(n=3)
    teacher[0, 1], teacher[1] = NAN, NAN
    found = Objective(M3KD(0.1, in_batch=False))(q.float(), torch.stack(columns, 1).flatten(0, 1).float(), batch | {"teacher": teacher.flatten()})["M3KD"]
    assert found.weight.tolist() == [1, 0, 1]
    s, t = torch.cosine_similarity(q[:1, None], torch.stack([columns[i][0] for i in (0, 2, 3)])[None], dim=-1)[0] / 0.1, teacher[0, [0, 2, 3]].double().softmax(0)
    assert found.value[0].item() == pytest.approx(sum(t[i] * (s[i:].logsumexp(0) - s[i]) for i in range(3)).item(), rel=1e-4)


# ---- the short way and the long way

@pytest.mark.parametrize("positives", ["each", "together"])
@pytest.mark.parametrize("seed", range(5))
def test_exceptions_and_matrices(positives, seed):
    "InfoNCE from exceptions equals InfoNCE from matrices, value and gradient, whatever stands in the relation."
    g = torch.Generator().manual_seed(seed)
    kind = torch.tensor([SKIP, NEG, NEG, NEG, OWN, POS])[torch.randint(0, 6, (7, 11), generator=g)].to(torch.int8)
    kind[2] = NEG  # a query without anything of its own
    found = []
    for loss in (InfoNCE(0.1, positives=positives), InfoNCE(0.1, positives=positives, weighted=True)):  # without scores all weigh 1
        s = torch.randn(7, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
        terms = loss(s, Relation(kind, torch.full((7, 11), NAN)))
        (terms.value * terms.weight).sum().backward()
        found.append((terms.value.detach(), terms.weight, s.grad))
    for short, long in zip(*found): assert torch.allclose(short.double(), long.double(), atol=1e-9)
    assert not found[0][2][kind == SKIP].any() and found[0][1][2] == 0


@pytest.mark.parametrize("seed", range(5))
def test_relation_pair_by_pair(seed):
    "Every pair of both views is what the rules say."
    from nixietune.relation import relate
    g = torch.Generator().manual_seed(seed)
    n, m = 6, 9
    pairs_of = [(q, d) for q in range(n) for d in torch.randperm(m, generator=g)[:q % 4].tolist()]
    rows, cols = torch.tensor(pairs_of).T
    kind = torch.tensor([SKIP, OWN, POS])[torch.randint(0, 3, (len(rows),), generator=g)].to(torch.int8)
    known = torch.stack([torch.randint(0, n, (8,), generator=g), torch.randint(95, 100 + m + 5, (8,), generator=g)]).unique(dim=1)
    batch = {"q_id": torch.arange(n), "d_id": 100 + torch.arange(m), "edges": torch.stack([rows, cols]), "kind": kind, "known": known,
        "score": torch.rand(len(rows), generator=g), "teacher": torch.full((len(rows),), NAN)}
    said = {(q, d): k for q, d, k in zip(rows.tolist(), cols.tolist(), kind.tolist())}
    is_known = {(q, d - 100) for q, d in known.T.tolist()}
    rule = lambda q, d: POS if said.get((q, d)) == POS else SKIP if (q, d) in is_known or said.get((q, d)) == SKIP else said.get((q, d), NEG)
    whole, own = relate(batch), relate(batch, "own")
    assert whole.kind.tolist() == [[rule(q, d) for d in range(m)] for q in range(n)]
    mine = {q: [d for p, d in pairs_of if p == q] for q in range(n)}
    most = max(map(len, mine.values()))
    assert whole.own.tolist() == [mine[q] + [-1] * (most - len(mine[q])) for q in range(n)]
    assert own.kind.tolist() == [[rule(q, d) for d in mine[q]] + [SKIP] * (most - len(mine[q])) for q in range(n)]
    assert torch.equal(own.score.nan_to_num(-1), torch.stack([torch.where(o >= 0, whole.score[q].gather(0, o.clamp(min=0)), -1) for q, o in enumerate(whole.own)]))


# ---- a guide says which negatives are answers

@pytest.mark.parametrize("negatives, directions", [(0, DIRECTIONS), (0, DIRECTIONS[:2]), (0, DIRECTIONS[:1]), (1, DIRECTIONS[:1])], ids=str)
@pytest.mark.parametrize("margin, relative", [(0.0, False), (0.1, False), (0.3, True), (-0.2, False)])
def test_guide(negatives, directions, margin, relative):
    "GISTEmbedLoss with vectors in place of models: its margin is below the positive, ours above."
    directions = [o for o in directions if o != "doc_to_query"]  # which it does not have
    if margin < 0 and len(directions) > 1: pytest.skip("then theirs holds a query against itself")
    q, columns, _, batch = groups(negatives=negatives)
    torch.manual_seed(0)
    d, guide = torch.stack(columns, 1).flatten(0, 1), torch.randn(len(q) * (1 + len(columns)), 5, dtype=q.dtype)
    guide[len(q):len(q) + 8] = guide[:8] + guide[len(q):len(q) + 8]  # near enough that something is left out
    columns_of_guide = [guide[:len(q)], *guide[len(q):].view(len(q), len(columns), -1).unbind(1)]

    class Whose(torch.nn.Module):
        def __init__(self, vectors): super().__init__(); self.vectors = vectors
        def forward(self, features): return {"sentence_embedding": self.vectors[features["i"]]}
    gist = theirs.GISTEmbedLoss.__new__(theirs.GISTEmbedLoss)  # which wants models to be made
    torch.nn.Module.__init__(gist)
    gist.model, gist.guide, gist.must_retokenize, gist.gather_across_devices = Whose([q, *columns]), Whose(columns_of_guide), False, False
    gist.temperature, gist.margin, gist.margin_strategy = 0.07, margin, "relative" if relative else "absolute"
    gist.contrast_anchors, gist.contrast_positives = "query_to_query" in directions, "doc_to_doc" in directions
    gist.similarity_fct, gist.cross_entropy_loss = torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss()
    wanted = gist([{"i": i} for i in range(1 + len(columns))], None)

    loss = InfoNCE(0.07, guided=True, leave_out=-margin, relative=relative, directions=tuple(directions))
    terms = Objective(loss)(q, d, batch | {"vectors": {"guide": guide}})["InfoNCE"]
    plain = Objective(InfoNCE(0.07, directions=tuple(directions)))(q, d, batch)["InfoNCE"]
    assert (terms.value - plain.value).abs().max() > 1e-3  # something is left out
    same((terms.value * terms.weight).sum() / len(q), wanted, q, *columns)


def test_a_guide_is_missed():
    q, columns, _, batch = groups()
    with pytest.raises(InputError, match="a guide's vectors"): Objective(InfoNCE(guided=True))(q, torch.stack(columns, 1).flatten(0, 1), batch)


@pytest.mark.parametrize("losses", [InfoNCE(0.1), [InfoNCE(0.2, in_batch=False), KL(0.3)]], ids=str)
def test_a_learned_temperature(losses):
    "Its gradient is that of the logarithm, by differences; and it stays at 0.01 or above."
    from nixietune.objectives import LOWEST_TEMPERATURE
    q, columns, _, batch = groups()
    d, objective = torch.stack(columns, 1).flatten(0, 1), Objective(losses, learn_temperature=True).double()
    total = lambda: sum((o.value * o.weight).sum() for o in objective(q, d, batch).values())
    total().backward()
    for o in objective.temperatures:
        with torch.no_grad():
            o += 3e-3; above = total(); o -= 6e-3; below = total(); o += 3e-3
        assert o.grad.item() == pytest.approx(((above - below) / 6e-3).item(), rel=1e-2, abs=1e-3)
    with torch.no_grad(): objective.temperatures[0].fill_(-9.0)
    total()
    assert objective.temperatures[0].exp().item() == pytest.approx(LOWEST_TEMPERATURE)


@pytest.mark.parametrize("make, problem", [(lambda: KL(temperature=0), "temperature=0"), (lambda: KL(teacher_temperature=-1), "teacher_temperature=-1"), (lambda: CoSENT(0), "temperature=0"),
    (lambda: InfoNCE("0.05"), "a number above 0"), (lambda: InfoNCE(in_batch=1), "in_batch=1"), (lambda: InfoNCE(similarity="cosine"), "'cos' or 'dot'"), (lambda: Contrastive(similarity="dot"), "'cos' or 'euclidean'"),
    (lambda: InfoNCE(directions=("query_to_doc",) * 2), "each once"), (lambda: InfoNCE(relative=True), "a margin"), (lambda: InfoNCE(weighted=True, directions=tuple(DIRECTIONS)), "weighted=False"),
    (lambda: Objective(InfoNCE(0.001), learn_temperature=True), "0.01 or more"), (lambda: Objective(MarginMSE(), learn_temperature=True), "a loss with a temperature"), (lambda: Objective([]), "at least one")])
def test_settings_that_cannot_be(make, problem):
    with pytest.raises(InputError, match=problem): make()


def test_no_documents_at_all():
    "Groups that have none: weight 0, for a loss with a margin, too."
    none, numbers = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    nothing = {"q_id": torch.arange(3), "d_id": none, "edges": torch.zeros(2, 0, dtype=torch.int64), "kind": none.to(torch.int8), "score": numbers, "teacher": numbers, "known": torch.zeros(2, 0, dtype=torch.int64)}
    for loss in (InfoNCE(), InfoNCE(leave_out=0.1), Cosine(), KL(), Triplet(0.2, True, "cos"), M3KD(), CoSENT()):
        (terms,) = Objective(loss)(torch.randn(3, 4), torch.randn(0, 4), nothing).values()
        assert not terms.weight.any() and not terms.value.any(), loss
