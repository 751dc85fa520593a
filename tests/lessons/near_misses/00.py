"""Wrong answers that students give in lesson 00, and a fragment of the message that each of them must get."""

SURVIVES = """
def survives(classify, images, change):
    before, after = classify(images), classify(change(images))
    return {}
"""
SHARE = "(before.argmax(1) == after.argmax(1)).double().mean()"

NEAR_MISSES = {
    "00.1": [
        ("largest scores", SURVIVES.format("(before.amax(1) == after.amax(1)).double().mean()"), "the largest scores"),
        (
            "all scores",
            SURVIVES.format("((before - after).abs() < 0.2).double().mean()"),
            "You compared all scores",
        ),
        ("changed", SURVIVES.format(SHARE.replace("==", "!=")), "whose class changes"),
        ("counted", SURVIVES.format(SHARE.replace("mean", "sum")), "You counted the images"),
        ("percent", SURVIVES.format("100 * " + SHARE), "That is a percentage"),
        ("nothing changed", SURVIVES.format(SHARE).replace("change(images)", "images"), "Nothing was changed"),
        ("along the images", SURVIVES.format(SHARE.replace("(1)", "(0)")), "along the other axis"),
        ("one for each image", SURVIVES.format(SHARE.removesuffix(".mean()")), "Expected one number"),
        ("no return", SURVIVES.format(SHARE).replace("return ", ""), "does your function end with `return`"),
    ],
}
