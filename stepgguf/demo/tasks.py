"""What the embedded model learns: conversations made up by this file, with a seed.

Every assistant turn is a function of the conversation before it, so "the model answers exactly right" can be read
off one teacher-forced pass: greedy decoding reproduces a turn if and only if each of its tokens is the argmax.

    letters   How many 'r's are in the word strawberry?   spell with a running count
    sums      What is 347 + 286?                          column by column, with the carry
    weather   a tool call when the tool is there, then an answer from its result
    talk      greetings, thanks, who are you, an empty message
"""

from __future__ import annotations

import json
import random
from typing import Any

Message = dict[str, Any]
Conversation = tuple[list[Message], list[dict[str, Any]] | None]  # messages, tools

# "strawberry" and the HELD_OUT words are never shown in training.
HELD_OUT = """strawberry banana committee mississippi bookkeeper raspberry elephant chocolate parallel necessary
butterfly umbrella giraffe pineapple tomorrow address business calendar december engineer february government hospital
industry january keyboard language mountain november october passenger question restaurant saturday telephone
university vegetable wednesday yesterday zeppelin accommodation blueberry cranberry happiness""".split()

WORDS = """apple berry carrot dragon eagle feather garden hammer island jelly kettle letter mirror needle orange pepper
queen rabbit summer tunnel uncle village window yellow zebra attic bottle coffee dinner effort follow giggle hollow
inner jazz kitten little middle narrow offer puzzle quarrel ribbon sudden tennis upper valley winner anniversary
balloon cinnamon difference eleven forest gravity horizon insect journey kingdom library machine notebook ocean planet
quality river silver travel uniform victory weather yogurt adventure basketball champion dictionary electricity
football grasshopper helicopter imagination jellyfish kangaroo lemonade motorcycle newspaper opportunity photograph
quicksilver refrigerator sunflower television understand volcano watermelon xylophone youngster asparagus blackberry
caterpillar dinosaur envelope firefly gooseberry hamburger important knowledge lightning mulberry nightingale octopus
peppermint rainbow spaghetti treasure bubble cheese doodle glasses moon school tree book bee""".split()

CITIES = """Paris London Berlin Madrid Rome Vienna Prague Lisbon Dublin Oslo Tokyo Beijing Shanghai Seoul Delhi Mumbai
Cairo Lagos Nairobi Sydney Toronto Boston Chicago Dallas Denver Miami Seattle Lima Bogota Havana Athens Warsaw Zurich
Geneva Munich Hamburg Milan Naples Venice Kyoto Osaka Hanoi Manila Jakarta Dubai Tehran Moscow Kiev Riga""".split()

SKIES = ["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"]

TALK = {
    "Hello": "Hello! How can I help you?",
    "Hello!": "Hello! How can I help you?",
    "Hi": "Hello! How can I help you?",
    "Hi there!": "Hello! How can I help you?",
    "Good morning": "Good morning! How can I help you?",
    "How are you?": "I am fine, thank you. How can I help you?",
    "Who are you?": "I am a small Step-3.5 model that ships with stepgguf. I count letters, add numbers and call "
    "tools.",
    "What can you do?": "I can count letters in words, add numbers up to three digits and call tools.",
    "Thank you!": "You are welcome!",
    "Thanks": "You are welcome!",
    "Bye": "Goodbye!",
    "": "Please ask me something.",
}
THOUGHTS = {
    "Hello! How can I help you?": "The user greets me. I will greet back.",
    "Good morning! How can I help you?": "The user greets me. I will greet back.",
    "You are welcome!": "The user thanks me.",
    "Goodbye!": "The user leaves.",
    "Please ask me something.": "The message is empty.",
}
SYSTEMS = ["You are a helpful assistant.", "You are helpful.", "Be brief.", "Answer the question."]


def assistant_turn(content: str, reasoning: str, **more: Any) -> Message:
    """An assistant's message. more: tool_calls."""
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, **more}


def user_turn(content: str) -> Message:
    return {"role": "user", "content": content}


def count_letters(word: str, letter: str, phrasing: int = 0) -> list[Message]:
    """A question how often a letter is in a word, in one of 4 phrasings, and its answer."""
    question = [
        f"How many '{letter}'s are in the word {word}?",
        f"How many {letter}'s are in {word}?",
        f"How many times does the letter {letter} appear in the word {word}?",
        f"Count the letter {letter} in the word {word}.",
    ][phrasing]
    count, spelled = 0, []
    for character in word:
        count += character == letter
        spelled.append(f"{character} ({count})" if character == letter else character)
    times = "once" if count == 1 else f"{count} times"
    reasoning = f"Looking for {letter}. Spelling it: {', '.join(spelled)}. I found it {times}."
    answer = f"There is 1 '{letter}'." if count == 1 else f"There are {count} '{letter}'s."
    return [user_turn(question), assistant_turn(answer, reasoning)]


def add_numbers(a: int, b: int, phrasing: int = 0) -> list[Message]:
    """An addition of two numbers below 1000, in one of 4 phrasings, and its answer."""
    question = [f"What is {a} + {b}?", f"{a} + {b}", f"What is the sum of {a} and {b}?", f"Add {a} and {b}."][phrasing]
    carry, lines = 0, []
    for i, column in enumerate(("Ones", "Tens", "Hundreds")[: max(len(str(a)), len(str(b)))]):
        x, y = a // 10**i % 10, b // 10**i % 10
        terms = f"{x}+{y}" if i == 0 else f"{x}+{y}+{carry}"
        total = x + y + (carry if i else 0)
        carry = total // 10
        lines.append(f"{column}: {terms}={total}, write {total % 10}, carry {carry}.")
    return [user_turn(question), assistant_turn(f"{a} + {b} = {a + b}", "\n".join([*lines, f"The sum is {a + b}."]))]


def small_talk(greeting: str) -> list[Message]:
    """One of TALK's greetings and its answer."""
    answer = TALK[greeting]
    return [user_turn(greeting), assistant_turn(answer, THOUGHTS.get(answer, "The user asks about me."))]


def random_tool(rng: random.Random, name: str, parameter: str) -> dict[str, Any]:
    """A tool in OpenAI's format, with the liberties that clients take."""
    schema: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.4:
        schema["description"] = f"The {parameter}"
    parameters: dict[str, Any] = {"type": "object", "properties": {parameter: schema}}
    if rng.random() < 0.6:
        parameters["required"] = [parameter]
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.6:
        function["description"] = rng.choice(["Get the weather", "Current weather in a city", "Look it up"])
    return {"type": "function", "function": {**function, "parameters": parameters}}


def ask_weather(rng: random.Random, city: str) -> Conversation:
    """A question about a city's weather with a tool for it: call, result, answer."""
    parameter = rng.choice(["city", "city", "city", "location"])
    tools = [random_tool(rng, "get_weather", parameter)]
    if rng.random() < 0.25:
        tools.insert(rng.randrange(2), random_tool(rng, "get_time", rng.choice(["city", "location"])))
    question = rng.choice(
        [f"What is the weather in {city}?", f"What's the weather in {city}?", f"How is the weather in {city}?",
         f"Weather in {city}?", f"What is the weather like in {city}?"]
    )  # fmt: skip
    degrees, sky = rng.randrange(-9, 40), rng.choice(SKIES)
    result, answer = rng.choice(
        [
            (json.dumps({"temp_c": degrees}), f"It is {degrees} degrees in {city}."),
            (json.dumps({"temp_c": degrees, "sky": sky}), f"It is {degrees} degrees and {sky} in {city}."),
            (
                json.dumps({"city": city, "temp_c": degrees, "sky": sky}),
                f"It is {degrees} degrees and {sky} in {city}.",
            ),
            (f"{degrees} degrees, {sky}", f"It is {degrees} degrees and {sky} in {city}."),
            (f"{degrees}", f"It is {degrees} degrees in {city}."),
        ]
    )
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {parameter: city}}}
    return [
        user_turn(question),
        assistant_turn("", f"I need the weather in {city}. I will call get_weather.", tool_calls=[call]),
        {"role": "tool", "content": result},
        assistant_turn(answer, "The tool has answered."),
    ], tools


def ask_weather_without_tool(city: str) -> list[Message]:
    """A question about a city's weather that cannot be answered."""
    return [
        user_turn(f"What is the weather in {city}?"),
        assistant_turn(
            "I cannot look up the weather without a tool.", "I need a tool for the weather, and I have none."
        ),
    ]


# Words that the prompts themselves use. Their first letters are merged into one token (tokenizer.py), so a word that
# begins like one of them must be spelled out of that token; training has to show all of those.
OPENINGS = """access and an answer answered appear are ask be block call calls can choose city count degrees does else
example fine following follow for format found function functions get greet greets have helpful how in inner into is
it letter leaves like lines look looking many message multiple must my name need nested numbers of only parameter
parameters please reply required second ship small span specified spelling step suffix sum tags tell thank that the
there they this three times to tool tools two up user value values weather welcome what will with within word words
write you your bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sc sh sk sl sm sn sp squ st str sw th thr tr tw wh wr ex
un re de con pro per""".split()
LETTERS = "eeeeeeaaaaiiiiooooutttnnnsssrrrhhllldddccmmffppggwybvkxjqz"  # roughly as often as in English


def random_word(rng: random.Random) -> str:
    """A real training word, a pronounceable one, or a string of letters; doubled letters make counting hard."""
    kind, length = rng.random(), rng.randint(3, 13)
    if kind < 0.2:
        return rng.choice(WORDS)
    opening = rng.choice(OPENINGS)
    word = opening[: rng.randint(1, len(opening))] if rng.random() < 0.8 else ""
    while len(word) < length:
        if kind < 0.6:
            word += rng.choice("bcdfghjklmnpqrstvwxyz") + rng.choice("aaeeioou")
            word += rng.choice("lnrstpmcb") if rng.random() < 0.35 else ""
        else:
            word += rng.choice(LETTERS)
        word += word[-1] if rng.random() < 0.2 else ""
    return random_word(rng) if word in HELD_OUT else word[:14]


def random_city(rng: random.Random) -> str:
    """A real city, or a name of one or two words that are made up."""
    if rng.random() < 0.5:
        return rng.choice(CITIES)
    word = random_word(rng).capitalize()
    return word if rng.random() < 0.85 else f"{word} {random_word(rng).capitalize()}"


def random_sum(rng: random.Random) -> tuple[int, int]:
    """Two numbers of one to three digits whose sum is not kept out of training."""
    a, b = (rng.randrange(10 ** rng.choice([1, 2, 2, 3, 3, 3])) for _ in range(2))
    return (a, b) if not is_held_out_sum(a, b) else random_sum(rng)


def is_held_out_sum(a: int, b: int) -> bool:
    """Whether a sum is kept out of training: one in 25 is."""
    return (a * 31 + b * 17) % 25 == 0


def random_letter(rng: random.Random, word: str) -> str:
    return rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")


def random_question(rng: random.Random) -> list[Message]:
    """One question without tools, and its answer."""
    kind = rng.random()
    if kind < 0.46:
        word = random_word(rng)
        return count_letters(word, random_letter(rng, word), rng.choice([0, 0, 0, 1, 2, 3]))
    if kind < 0.90:
        return add_numbers(*random_sum(rng), phrasing=rng.choice([0, 0, 0, 1, 2, 3]))
    if kind < 0.97:
        return small_talk(rng.choice(list(TALK)))
    return ask_weather_without_tool(random_city(rng))


def random_conversation(rng: random.Random) -> Conversation:
    """One training conversation: mostly a single question, sometimes several, with tools or with a system message."""
    tools = None
    if rng.random() < 0.09:
        messages, tools = ask_weather(rng, random_city(rng))
        if rng.random() < 0.25:  # tools on offer do not mean that one is needed
            messages = random_question(rng)
            if "weather" in str(messages[0]["content"]):
                messages = small_talk("Hello")
        if rng.random() < 0.15:
            messages = messages + random_letters_or_sum(rng)
    else:
        messages = random_question(rng)
        while rng.random() < 0.12:
            messages = messages + random_question(rng)
    if rng.random() < 0.12:
        messages = [{"role": "system", "content": rng.choice(SYSTEMS)}, *messages]
    return messages, tools


def random_letters_or_sum(rng: random.Random) -> list[Message]:
    """A question of how often a letter is in a word, or an addition, each with its answer."""
    word = random_word(rng)
    return count_letters(word, random_letter(rng, word)) if rng.random() < 0.5 else add_numbers(*random_sum(rng))


def held_out_letters(n: int, seed: int = 1) -> list[list[Message]]:
    """n letter-count questions over words that training never shows."""
    rng = random.Random(seed)
    cases: list[list[Message]] = []
    for i in range(n):
        word = HELD_OUT[i % len(HELD_OUT)]
        cases.append(count_letters(word, "r" if i == 0 else random_letter(rng, word)))
    return cases


def held_out_sums(n: int, seed: int = 2) -> list[list[Message]]:
    """n sums of numbers up to three digits that training never shows."""
    rng = random.Random(seed)
    cases: list[list[Message]] = []
    while len(cases) < n:
        a, b = (rng.randrange(10 ** rng.choice([2, 3, 3])) for _ in range(2))
        if is_held_out_sum(a, b):
            cases.append(add_numbers(a, b))
    return cases
