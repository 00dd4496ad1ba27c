"""Shell scripts at random, whose commands change three variables, and whose last one tells them."""

from random import Random

NAMES = ("A", "B", "C")
UNKNOWN = "probe"
"""A command that succeeds or not, as it likes."""


def any_script(seed: int) -> str:
    """A script that ends, unless it exits before, with `python a.py --x v$A-$B-$C`."""
    random = Random(seed)
    lines = [f"{name}={random.choice('124')}" for name in NAMES]
    lines += [_statement(random, 3, inside=False) for _ in range(random.randint(2, 5))]
    return "\n".join([*lines, 'python a.py --x "v$A-$B-$C"'])


def _number(random: Random) -> str:
    return random.choice(["1", "2", "4", "$A", "$B", "$C"])


def _test(random: Random) -> str:
    name, one, other = random.choice(NAMES), _number(random), _number(random)
    return random.choice(
        [
            f"[ {one} -eq {other} ]",
            f'[ "${name}" = {one} ]',
            f"[ ! {one} -gt {other} ]",
            f"[ {one} -gt 1 -a {other} -lt 4 ]",
            f'[ "${name}" = 1 -o {one} = 2 ]',
            f"[[ ${name} == {one} && {other} != 2 ]]",
            f"[[ ${name} == [12] || ${name} == '[4]' ]]",
            f"(( {name} > 1 ))",
            "[ -z $UNSET ]",
            UNKNOWN,
        ]
    )


def _assignment(random: Random) -> str:
    name, one, other = random.choice(NAMES), _number(random), _number(random)
    return random.choice(
        [
            f"{name}={one}",
            f"{name}=$(({one} + {other}))",
            f"(({name} += 1))",
            f"let {name}={one}",
            f"{name}+={random.choice('12')}",
            f"export {name}=${{{name}:-{one}}}",
            f"L=({one} {other}); {name}=${{L[1]}}",
            f"L+=({one}); {name}=${{#L[@]}}",
            f"set -- {one} {other}; shift; {name}=$1",
            f'eval "{name}={one}"',
            f"{name}={one} | cat",
            f"({name}={one}; {name}={other})",
            f"{name}={one} true",
            f"bash -c '{name}=7'",
            f"{_test(random)} && {name}={one}",
            f"! {_test(random)} && {name}={one} || {name}={other}",
        ]
    )


def _statement(random: Random, depth: int, inside: bool) -> str:
    """A statement; `inside` a function there is no other one."""
    if depth == 0 or random.random() < 0.3:
        return _assignment(random)

    def block() -> str:
        return "\n".join(_statement(random, depth - 1, inside) for _ in range(random.randint(1, 2)))

    name, one, other = random.choice(NAMES), _number(random), _number(random)
    kinds = [
        f"if {_test(random)}; then\n{block()}\nfi",
        f"if {_test(random)}; then\n{block()}\nelif {_test(random)}; then\n{block()}\nelse\n{block()}\nfi",
        f"case ${name} in\n 1|2) {block()} ;;\n (4)\n{block()}\n;;\n *) {block()};;\nesac",
        f"case ${name} in [12]) {_assignment(random)};; x*) {_assignment(random)};; esac",
        f"for i in {one} {other}; do\n{block()}\ndone",
        f"while {_test(random)}; do\n{block()}\nbreak\ndone",
        f"{_test(random)} && {{ {_assignment(random)}; {_assignment(random)}; }}",
        f"if {_test(random)}; then exit 0; fi",
    ]
    if not inside:
        body = "\n".join(_statement(random, depth - 1, inside=True) for _ in range(2))
        local = f"{random.choice(['local', 'declare', 'export'])} {name}=$1"
        kinds += [f"f() {{\n{local}\n{body}\n}}\n{_assignment(random)}\nf {one} {other}"] * 2
    return random.choice(kinds)
