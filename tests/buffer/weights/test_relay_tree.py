from buffer.weights.relay_tree import SILENT_SECONDS, RelayTree


def test_the_first_relays_pull_from_the_learner_and_each_serves_as_many():
    tree = RelayTree(2)
    parents = [tree.hear(f"host-{index}", f"relay-{index}", 0.0) for index in range(8)]
    assert parents == ["", "", "relay-0", "relay-0", "relay-1", "relay-1", "relay-2", "relay-2"]
    assert tree.hear("host-3", "relay-3", 1.0) == "relay-0"


def test_without_a_tree_every_relay_pulls_from_the_learner():
    tree = RelayTree(0)
    assert {tree.hear(f"host-{index}", f"relay-{index}", 0.0) for index in range(8)} == {""}


def test_a_relay_that_is_silent_is_gone_and_the_others_move_up():
    tree = RelayTree(1)
    for index in range(3):
        tree.hear(f"host-{index}", f"relay-{index}", 0.0)
    later = SILENT_SECONDS - 1
    assert [tree.hear(f"host-{index}", f"relay-{index}", later) for index in (1, 2)] == ["relay-0", "relay-1"]
    assert tree.at("host-0", later) == "relay-0" and tree.at("host-9", later) == ""
    assert tree.at("host-0", SILENT_SECONDS) == ""
    assert [tree.hear(f"host-{index}", f"relay-{index}", SILENT_SECONDS) for index in (1, 2)] == ["", "relay-1"]
