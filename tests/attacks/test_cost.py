from dipguard.attacks import Cost


def test_costs_add_up_and_read_well():
    cost = Cost(purifications=2, dip_steps=2000, victim_queries=2) + Cost(1, 1000, 1, 4)
    assert cost == Cost(3, 3000, 3, 4)
    assert sum([cost, cost], Cost()) == Cost(6, 6000, 6, 8)
    assert str(Cost(1500, 1_500_000, 1500, 7)) == (
        "1,500 purifications (1,500,000 DIP steps), 1,500 victim queries, 7 gradients"
    )
