from darkformer_jax.tasks.table import table_lines


def test_words_stand_on_the_left_and_figures_on_the_right():
    rows = [("", "loss", "bits"), ("all of it", "3.0655", "1.1"), ("a", "10.0", "-")]
    assert table_lines(rows) == [
        "              loss   bits",
        "all of it   3.0655    1.1",
        "a             10.0      -",
    ]
