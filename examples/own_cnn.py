"""Your own network and your own loop: prune half of the multiply-adds, train on, save, load. Half a minute."""

from __future__ import annotations

from parts import accuracy, batches, digits, loss, network, options, train

import prunella as pr


def main() -> None:
    given = options(__doc__)
    data, test = digits()
    dense = train(network(), data, 1 if given.quick else 15)
    some = batches(data)[:8]
    recipe = pr.Recipe(pr.taylor, pr.Channel(), pr.global_, min_density=0.1)
    plan = pr.plan(dense, some[0][0], recipe, target=pr.MACs(0.5), data=some, loss=loss)
    print(plan)
    small = pr.shrink(dense, plan)  # an ordinary module: train it as any other
    cut = accuracy(small, test)
    train(small, data, 1 if given.quick else 5)
    print(f"accuracy {accuracy(dense, test):.3f} dense, {cut:.3f} cut, {accuracy(small, test):.3f} trained on")
    pr.save(small, given.out / "small", plan=plan, factory=network)
    again = pr.load(given.out / "small", factory=network)
    assert accuracy(again, test) == accuracy(small, test)
    print(pr.report(dense, small, some[0][0], rounds=5 if given.quick else 40).verdict)


if __name__ == "__main__":
    main()
