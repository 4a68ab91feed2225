"""The facts and paragraphs of the demo corpus; plain data, written for this project."""

from typing import NamedTuple


class Topic(NamedTuple):
    """A subject with its other names, a sentence that defines it and a paragraph about it."""

    names: tuple[str, ...]
    verb: str
    short: str
    paragraph: str


TOPICS: tuple[Topic, ...] = (
    Topic(
        ("AI", "artificial intelligence"),
        "is",
        "AI is the science of making machines do things that need intelligence in people.",
        "AI, or artificial intelligence, is the science of making machines do things that need "
        "intelligence in people. An AI system can read text, look at pictures, play games and "
        "answer questions. Most systems today are not told every rule. They learn from many "
        "examples instead. AI is useful in medicine, science and daily work, but it can be "
        "wrong, so its answers should be checked.",
    ),
    Topic(
        ("ML", "machine learning"),
        "is",
        "ML, or machine learning, is the part of AI in which a program learns from examples.",
        "Machine learning is the part of AI in which a program learns from examples. Nobody "
        "writes the rules by hand. The program makes a guess, measures how wrong it was and "
        "changes its numbers a little. After many rounds the guesses are good. Machine learning "
        "sorts mail, finds songs, reads handwriting and translates text. It needs clean data "
        "and an honest test.",
    ),
    Topic(
        ("deep learning",),
        "is",
        "Deep learning is machine learning with neural networks that have many layers.",
        "Deep learning is machine learning with neural networks that have many layers. The "
        "first layers find simple patterns, such as edges in a picture. Later layers join them "
        "into parts, objects and ideas. Deep learning needs a lot of data and fast chips. It "
        "is behind most progress in speech, vision and language.",
    ),
    Topic(
        ("neural networks",),
        "are",
        "Neural networks are chains of simple sums whose weights are learned from data.",
        "Neural networks are chains of simple sums whose weights are learned from data. Each "
        "layer takes numbers, mixes them and passes them on. Alone, one unit can do very "
        "little. Together, millions of units can tell a cat from a dog. The idea came from the "
        "brain, but real brains work in other ways.",
    ),
    Topic(
        ("diffusion language models", "dLLMs"),
        "are",
        "Diffusion language models write text by filling in masked words in any order.",
        "Diffusion language models write text by filling in masked words in any order. They "
        "start from an answer that is all masks. In each step the model looks at the whole "
        "answer, guesses every hidden word and keeps the guesses it is most sure of. Several "
        "words can be written in one step, so such models can be fast. LLaDA and Dream are two "
        "of them.",
    ),
    Topic(
        ("LLaDA",),
        "is",
        "LLaDA is a diffusion language model that fills in masked words step by step.",
        "LLaDA is a diffusion language model. It is trained to fill in words that were hidden "
        "behind masks. To answer a question it starts with masks only and uncovers the words "
        "it is most sure of first. It reads in both directions, so a late word can help an "
        "early one. The answer is often cut into blocks that are written from left to right.",
    ),
    Topic(
        ("Dream",),
        "is",
        "Dream is a diffusion language model that was made from a model of the usual kind.",
        "Dream is a diffusion language model that was made from a model of the usual kind. It "
        "kept the habit of looking one place ahead, so the word at a place is read from the "
        "place before it. Like LLaDA it fills in masks, a few at a time. It is good at plans "
        "and puzzles, where words must fit together.",
    ),
    Topic(
        ("Triton", "Triton Inference Server"),
        "is",
        "Triton is a server that runs trained models and answers requests over a network.",
        "Triton is a server that runs trained models and answers requests over a network. Each "
        "model lives in a folder with a file that names its inputs and outputs. Triton queues "
        "the requests, joins them into batches and counts how long they take. It can be asked "
        "over HTTP or gRPC. One server can hold many models at the same time.",
    ),
    Topic(
        ("a GPU", "GPUs"),
        "is",
        "A GPU is a chip that does many simple sums at the same time.",
        "A GPU is a chip that does many simple sums at the same time. It was made to draw "
        "pictures for games. Then people saw that neural networks need the same kind of work. "
        "A GPU has its own fast memory, and moving data to it costs time. Good programs keep "
        "the chip busy and move as little as they can.",
    ),
    Topic(
        ("tokens",),
        "are",
        "Tokens are the small pieces of text that a language model reads and writes.",
        "Tokens are the small pieces of text that a language model reads and writes. A common "
        "word is one token, and a rare word is cut into several. Each token has a number. The "
        "model sees only the numbers. A file called a tokenizer turns text into tokens and "
        "tokens back into text.",
    ),
    Topic(
        ("a language model", "language models"),
        "is",
        "A language model is a program that has learned which words fit together.",
        "A language model is a program that has learned which words fit together. It is shown "
        "a great deal of text and must guess the words that are missing. To guess well it "
        "picks up grammar, facts and style. It can then write letters, explain ideas or answer "
        "questions. It does not look things up, so it may sound sure and still be wrong.",
    ),
    Topic(
        ("attention",),
        "is",
        "Attention is the way a model decides which other words matter for a word.",
        "Attention is the way a model decides which other words matter for a word. Every word "
        "asks a question, and every word offers a key. Where question and key fit, information "
        "flows. This lets the model join words that are far apart. The cost grows with the "
        "square of the length, so long texts are slow.",
    ),
    Topic(
        ("a cache", "caches"),
        "is",
        "A cache is a small fast store for results that will be needed again.",
        "A cache is a small fast store for results that will be needed again. Work that was "
        "done once need not be done twice. The hard part is to know when a stored result is "
        "too old. A good cache is small, quick and rarely wrong. Computers have caches "
        "everywhere, from chips to web pages.",
    ),
    Topic(
        ("Python",),
        "is",
        "Python is a programming language that is easy to read and widely used.",
        "Python is a programming language that is easy to read and widely used. Blocks are "
        "marked by spaces at the start of a line. It comes with a large library, and many more "
        "packages can be added. Python itself is slow, but it can call fast code. Most work on "
        "AI is written in it.",
    ),
    Topic(
        ("the internet",),
        "is",
        "The internet is a network of networks that joins computers all over the world.",
        "The internet is a network of networks that joins computers all over the world. Data "
        "is cut into small packets, and each packet finds its own way. If one path is broken, "
        "another is used. Mail, video and web pages all travel like this. Nobody owns the "
        "whole of it.",
    ),
    Topic(
        ("the sea", "the ocean"),
        "is",
        "The sea is the salt water that covers most of the Earth.",
        "The sea is the salt water that covers most of the Earth. The moon pulls at it and "
        "makes the tides. Wind makes the waves. Near the surface there is light and much life. "
        "Far below it is cold and dark, yet fish live there too. The sea warms and cools "
        "slowly, so it keeps the weather mild.",
    ),
    Topic(
        ("bread",),
        "is",
        "Bread is a food made from flour and water and baked in an oven.",
        "Bread is a food made from flour and water and baked in an oven. Yeast makes small "
        "bubbles of gas, and the dough rises. Salt gives it taste. The heat of the oven makes "
        "a brown crust outside and leaves the middle soft. People have baked bread for "
        "thousands of years.",
    ),
    Topic(
        ("tea",),
        "is",
        "Tea is a drink made by pouring hot water over the leaves of a plant.",
        "Tea is a drink made by pouring hot water over the leaves of a plant. Green tea and "
        "black tea come from the same bush. The leaves of black tea are left in the air until "
        "they turn dark. Tea is drunk plain, with milk or with lemon. In many countries it is "
        "offered to every guest.",
    ),
    Topic(
        ("coffee",),
        "is",
        "Coffee is a dark drink made from the roasted seeds of a small tree.",
        "Coffee is a dark drink made from the roasted seeds of a small tree. The seeds are "
        "called beans. They are roasted until they are brown, then ground and mixed with hot "
        "water. Coffee keeps people awake, and many drink it in the morning. It grows in warm "
        "lands near the middle of the Earth.",
    ),
    Topic(
        ("the moon",),
        "is",
        "The moon is the ball of rock that goes around the Earth.",
        "The moon is the ball of rock that goes around the Earth. One round takes about a "
        "month. The moon has no light of its own and shines because the sun lights it. We "
        "always see the same side. It has no air, so footprints stay for a very long time. "
        "People first walked there in 1969.",
    ),
    Topic(
        ("the sun",),
        "is",
        "The sun is the star that gives the Earth light and heat.",
        "The sun is the star that gives the Earth light and heat. It is a huge ball of hot "
        "gas. Deep inside, light atoms are pressed together into heavier ones, and this sets "
        "energy free. The light needs about eight minutes to reach us. Without the sun there "
        "would be no plants and no weather.",
    ),
    Topic(
        ("rain",),
        "is",
        "Rain is water that falls from clouds in drops.",
        "Rain is water that falls from clouds in drops. The sun warms the sea, and water rises "
        "into the air as vapour. High up it is cold, so the vapour turns into tiny drops and "
        "makes clouds. When the drops grow heavy they fall. Rain fills the rivers and lets "
        "plants grow.",
    ),
    Topic(
        ("trees", "a tree"),
        "are",
        "Trees are tall plants with a trunk made of wood.",
        "Trees are tall plants with a trunk made of wood. Their roots drink water from the "
        "ground, and their leaves catch the light. They take a gas from the air and turn it "
        "into sugar. Each year most trees add a ring of wood, so the rings tell their age. "
        "Birds and insects live in them.",
    ),
    Topic(
        ("music",),
        "is",
        "Music is sound that people put in order so that it moves us.",
        "Music is sound that people put in order so that it moves us. It has rhythm, which is "
        "order in time, and melody, which is order in height. Some music is sung and some is "
        "played. Every people on Earth has music of its own. It is heard at feasts, at work "
        "and when children fall asleep.",
    ),
    Topic(
        ("chess",),
        "is",
        "Chess is a board game for two players with sixteen pieces each.",
        "Chess is a board game for two players with sixteen pieces each. The aim is to attack "
        "the king so that it cannot escape. Each kind of piece moves in its own way. There is "
        "no luck in the game, only skill. Computers have played chess better than people for "
        "many years.",
    ),
    Topic(
        ("dogs", "a dog"),
        "are",
        "Dogs are animals that have lived with people longer than any other.",
        "Dogs are animals that have lived with people longer than any other. They come from "
        "wolves. A dog hears and smells far better than we do. Dogs guard houses, herd sheep, "
        "guide the blind and find people who are lost. Above all they are good company. They "
        "need food, walks and kindness.",
    ),
    Topic(
        ("books", "a book"),
        "are",
        "Books are pages of writing that are bound together and can be read again.",
        "Books are pages of writing that are bound together and can be read again. Once they "
        "were copied by hand and cost as much as a house. Then printing made them cheap. A "
        "book can teach, warn or make us laugh. With it we can listen to people who lived long "
        "ago or far away.",
    ),
    Topic(
        ("bicycles", "a bicycle"),
        "are",
        "Bicycles are light machines with two wheels that are driven by the legs.",
        "Bicycles are light machines with two wheels that are driven by the legs. A chain "
        "carries the force from the pedals to the back wheel. A moving bicycle stays upright "
        "because the rider steers a little all the time. It needs no fuel and little room. In "
        "a city it is often the fastest way to travel.",
    ),
)

# fmt: off
CAPITALS: tuple[tuple[str, str], ...] = (
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"),
    ("Portugal", "Lisbon"), ("Austria", "Vienna"), ("Poland", "Warsaw"), ("Greece", "Athens"),
    ("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Finland", "Helsinki"), ("Ireland", "Dublin"),
    ("Denmark", "Copenhagen"), ("Hungary", "Budapest"), ("Belgium", "Brussels"),
    ("Romania", "Bucharest"), ("Bulgaria", "Sofia"), ("Croatia", "Zagreb"), ("Serbia", "Belgrade"),
    ("Ukraine", "Kyiv"), ("Russia", "Moscow"), ("Turkey", "Ankara"), ("Egypt", "Cairo"),
    ("Morocco", "Rabat"), ("Kenya", "Nairobi"), ("Ghana", "Accra"), ("Nigeria", "Abuja"),
    ("Japan", "Tokyo"), ("China", "Beijing"), ("India", "New Delhi"), ("Thailand", "Bangkok"),
    ("Vietnam", "Hanoi"), ("Nepal", "Kathmandu"), ("Iran", "Tehran"), ("Iraq", "Baghdad"),
    ("Canada", "Ottawa"), ("Cuba", "Havana"), ("Peru", "Lima"), ("Chile", "Santiago"),
    ("Brazil", "Brasilia"), ("Colombia", "Bogota"), ("Australia", "Canberra"),
)

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("light", "dark"), ("open", "closed"),
    ("up", "down"), ("left", "right"), ("young", "old"), ("rich", "poor"), ("early", "late"),
    ("full", "empty"), ("hard", "soft"), ("high", "low"), ("happy", "sad"), ("loud", "quiet"),
    ("long", "short"), ("near", "far"), ("clean", "dirty"), ("wet", "dry"), ("strong", "weak"),
    ("thick", "thin"), ("wide", "narrow"), ("deep", "shallow"), ("true", "false"),
    ("first", "last"), ("day", "night"), ("begin", "end"), ("win", "lose"), ("buy", "sell"),
    ("give", "take"), ("push", "pull"), ("love", "hate"), ("friend", "enemy"),
    ("summer", "winter"), ("north", "south"), ("east", "west"), ("inside", "outside"),
    ("above", "below"), ("before", "after"), ("always", "never"),
)

SPELLED: tuple[str, ...] = (
    "apple", "bird", "boat", "book", "bread", "bridge", "camel", "candle", "castle", "chair",
    "clock", "cloud", "doctor", "dragon", "eagle", "earth", "farmer", "finger", "flower",
    "forest", "friend", "garden", "grape", "hammer", "horse", "house", "island", "jacket",
    "jungle", "kettle", "kitten", "ladder", "lemon", "letter", "market", "mirror", "monkey",
    "mother", "needle", "number", "orange", "painter", "paper", "pencil", "planet", "pocket",
    "queen", "rabbit", "river", "school", "silver", "spoon", "summer", "table", "teacher",
    "tiger", "train", "valley", "village", "water", "window", "winter", "wolf", "yellow",
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)
# fmt: on

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Good morning", "Hey"),
        "Hello! Ask me a sum, a capital or a topic such as the sea.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am a very small diffusion language model, trained as a demo.",
    ),
    (
        ("What can you do?", "Help", "How can you help me?"),
        "I can add, sort, spell, name capitals and tell you about a few topics.",
    ),
    (("Thank you", "Thanks", "Thank you!", "Thanks!"), "You are welcome."),
    (("Goodbye", "Bye", "Good night"), "Goodbye, and come back soon."),
)
