"""How entries on a expedition are worded."""

from kvprofile.samples.encyclopedia.topic import Topic

EXPEDITION = Topic(
    fields={
        "house": "word",
        "name": "{house} Expedition",
        "goal": "goal",
        "leader": "person",
        "training": "profession",
        "start": "word",
        "left": "year 1770 1934",
        "days": "count 61 1400",
        "doctor": "person",
        "transport": "transport",
        "trouble": "trouble",
        "second": "trouble",
        "trade": "trade",
        "dish": "dish",
        "works": "works",
        "season": "season",
        "animal": "animal",
        "adjective": "adjective",
        "noun": "noun",
    },
    opening=(
        "The {name} was sent out to find {goal}.",
        "The {name} set out for {goal}; what it brought back was of another kind.",
        "Officially the {name} was in search of {goal}.",
        "The {name} is one of the better documented attempts to reach {goal}.",
    ),
    statements=(
        (
            "Its leader was {leader}, {training} with no experience of such journeys.",
            "It was led by {leader}, {training}.",
            "The committee chose {leader} as leader, against the advice of its secretary.",
            "{leader} was its leader and paid for most of the equipment.",
        ),
        (
            "It left {start} in {left}, {transport}.",
            "In {left} it set out from {start}, {transport}.",
            "The party set out from {start} in {season} of the year {left}.",
            "{start} was the starting point; the party left in {left}, watched by a large crowd.",
        ),
        (
            "The journey lasted {days} days.",
            "It returned after {days} days.",
            "{days} days passed before the survivors were seen again.",
            "According to the log the journey took {days} days.",
        ),
        (
            "The doctor, {doctor}, kept the only complete diary.",
            "{doctor}, who served as doctor, made the drawings.",
            "That nobody died was the merit of the doctor, {doctor}.",
            "As doctor it engaged {doctor}, who had never left the city before.",
        ),
    ),
    remarks=(
        ("In the second month {trouble}.", "Soon {trouble}, and the plan had to be changed."),
        ("On the way back {second}.", "A relief party heard that {second}, and hurried."),
        ("It carried {trade} for barter.", "Sacks of {trade} were left along the way as a reserve."),
        ("The last meal before the return was {dish}.", "Everyone dreamed, the diary says, of {dish}."),
        ("A {animal} was named after the expedition.", "The sketch of an unknown {animal} caused a stir."),
        ("The flagship was called The {adjective} {noun}.", "A hill was named The {adjective} {noun}."),
        ("The {works} of the journey were shown in nine cities.", "Most {works} were lost in a river."),
        ("The results were printed at the public expense.", "The report appeared only after a lawsuit."),
        ("Nobody has repeated the route since.", "A road follows the route today.", "The route is still disputed."),
    ),
    questions=(
        ("Who was the leader of the {name}?", "leader"),
        ("From which place did the {name} set out?", "start"),
        ("In which year did the {name} set out?", "left"),
        ("How many days did the {name} last?", "days"),
        ("Who was the doctor of the {name}?", "doctor"),
    ),
)
