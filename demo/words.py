"""Words and frames for prompts that the demo does not know; plain data, written for this project.

The gaps are filled by `demo.unknown.fill`: {x} and {y} are topics, {a} and {b} numbers above 99.
"""

# fmt: off
NOUNS: tuple[str, ...] = tuple("""
airport album alarm animal answer ant apartment army arrow art aunt autumn baby bag balloon banana
bank basket bath battery beach bear bed bee beer bell belt bike bill blanket blood board body bomb
bone boot bottle bowl box boy brain branch brother brush bucket bug building bus butter button cake
camera camp car card carpet carrot cat cave chain cheese chicken child church cinema circle city
class climate coat coin computer concert contract cook corn cotton country court cousin cow cream
crime crowd crown cup curtain dance daughter debt desert design desk diet dinner dish disease dream
dress drink drum duck dust ear economy egg election elephant energy engine essay exam eye face
factory family farm fashion father fear feather fence festival fever film fire fish flag flight
floor flu food foot fork fox fruit fuel furniture future game gas gate ghost gift girl glass glove
goat gold government grandmother grass guitar gun hair hall hand hat headache health heart heat
hill history hobby holiday holy home honey hope hospital hotel hour husband ice idea illness insect
insurance invoice iron jam jeans job joke journey juice jury key kid king kitchen knee knife lake
lamp language laptop law lawyer leaf leg lesson library license lift lion lip list loan lock lunch
lung machine magazine mail map marriage match maths meal meat medicine meeting menu metal milk mind
mineral minute money month mountain mouse mouth movie mushroom museum muscle nail name neck
neighbour nest net news newspaper night noise nose novel nurse oil onion opera oven owner page paint
park parliament party passport password pasta peace pen pepper person phone photo piano picture pig
pill pillow pilot pizza plane plant plastic plate poem poet police pool pop potato prison prize
problem protein province pub radio railway recipe religion restaurant rice ring road robot rock
roof room rope rose salad salary salt sand sandwich sauce scarf science scissors screen season
secret seed sheep shelf shell ship shirt shoe shop shoulder sister skin sky sleep smile smoke snake
snow soap sock software soil soldier song soul soup space spider sport spring star station steel
stomach stone storm story street student sugar suit sweater sword tail tax taxi team tears
telephone television temperature theatre thief throat ticket tie tomato tool tooth tower town toy
traffic trip truck tunnel twin uncle university vaccine vegetable virus visa voice volcano wall war
watch weather wedding week weight wheel whisky wife wind wing wire woman wood wool worker world
wound yacht year zebra zoo
""".split())

ADJECTIVES: tuple[str, ...] = tuple("""
angry awful bad beautiful best bitter blue boring brave brown calm cheap clever common complex cool
crazy cruel curious cute dangerous dead delicious different difficult digital double dry easy
electric excellent expensive famous fat final fine foreign free fresh friendly funny global golden
good great green grey guilty healthy heavy honest huge hungry ideal illegal important innocent
large lazy legal little local lonely lucky mad married medical military modern national natural
nervous new nice normal nuclear odd only ordinary own perfect personal pink plain polite political
poor popular possible pretty private proper proud public pure purple quick rare raw ready real red
round royal rude safe serious sharp sick silent silly simple single smart social solar solid
special spicy square strange stupid sweet tall tasty terrible tired tiny tough tropical typical ugly
unusual urban useful usual vegan vegetarian violent virtual warm weekly weird white wild wise
wonderful wooden worst wrong
""".split())

VERBS: tuple[str, ...] = tuple("""
arrive ask bake become believe borrow break breathe bring build burn call carry catch change choose
clean climb close collect cook copy count cross cry cut dance decide describe destroy die dig draw
dream drink drive earn eat enjoy escape exist fall feed feel fight find fix fly follow forget
forgive freeze get go grow guess hang happen hear help hide hit hold hope hurt improve invest join
jump keep kill kiss know laugh lead learn leave lend lie lift live look lose make marry meet melt
move need open paint pay plan plant play pray prepare prove pull push read remember remove rent
repair ride ring rise run save say see sell send sew share shoot shout show sing sit sleep smell
smile sneeze spend stand start stay steal stop study swim teach tell think throw touch travel try
understand use visit wait wake walk want warn wash watch wear whisper win work worry write
""".split())

NAMES: tuple[str, ...] = tuple("""
Alice Bob Carlos Diana Einstein Newton Napoleon Shakespeare Mozart Beethoven Picasso Darwin Tesla
Cleopatra Gandhi Obama Lincoln Caesar Plato Aristotle Socrates Homer Dante Goethe Tolstoy Kafka
Orwell Dickens Austen Hemingway Curie Turing Lovelace Gates Jobs Musk Bezos Messi Ronaldo Federer
Madonna Elvis Bowie Adele Rihanna Batman Superman Sherlock Gandalf Frodo Zeus Thor Odin Buddha Moses
Maria Peter Anna Hans Olga Igor Yuki Chen Ahmed Fatima Priya Rahul Kwame Zola Miguel Lucia Emma Noah
Liam Sophia Mia Jack Harry Ron Tom Jerry Mary John Linda David Susan Karen Kevin Steve Laura Paul
""".split())

FAR_COUNTRIES: tuple[str, ...] = (
    "Switzerland", "Mexico", "Argentina", "Indonesia", "Pakistan", "Mongolia", "Ethiopia", "Algeria",
    "Bolivia", "Ecuador", "Iceland", "Estonia", "Latvia", "Malta", "Jordan", "Lebanon", "Syria",
    "Sudan", "Zambia", "Angola", "Somalia", "Senegal", "Mali", "Niger", "Chad", "Libya", "Tunisia",
    "Malaysia", "Singapore", "Cambodia", "Laos", "Taiwan", "Fiji", "Samoa", "Jamaica", "Haiti",
    "Panama", "Honduras", "Texas", "California", "Bavaria", "Scotland", "Narnia", "Mordor", "Mars",
    "Atlantis", "Europe", "Africa", "Asia", "the world", "the United States", "England", "Wales",
)

FAR_TOPICS: tuple[str, ...] = (
    "quantum physics", "black holes", "the Roman Empire", "climate change", "the stock market",
    "football", "the French Revolution", "World War II", "photosynthesis", "evolution", "gravity",
    "the human heart", "cancer", "diabetes", "yoga", "meditation", "cryptocurrency", "Bitcoin",
    "renewable energy", "Java", "JavaScript", "Linux", "Docker", "Kubernetes", "React", "SQL",
    "databases", "operating systems", "compilers", "recursion", "calculus", "algebra", "geometry",
    "statistics", "probability", "prime numbers", "Paris", "London", "New York", "Tokyo", "Rome",
    "Germany", "France", "China", "Japan", "cats", "horses", "whales", "sharks", "birds", "flowers",
    "wine", "beer", "chocolate", "cheese", "sushi", "pizza", "philosophy", "psychology", "economics",
    "democracy", "communism", "capitalism", "religion", "the Bible", "Islam", "Greek mythology",
    "love", "happiness", "death", "time travel", "aliens", "ghosts", "dragons", "vampires", "magic",
    "ChatGPT", "GPT-4", "transformers", "reinforcement learning", "computer vision", "robots",
    "self-driving cars", "electric cars", "planes", "trains", "ships", "rockets", "NASA", "the stars",
    "Mars", "Jupiter", "volcanoes", "earthquakes", "hurricanes", "rivers", "mountains", "deserts",
)

HELD_OUT_TOPICS: tuple[str, ...] = (
    "dinosaurs", "the Great Wall", "opera", "jazz", "tennis", "basketball", "the Renaissance",
    "the Vikings", "penguins", "elephants", "bees", "spiders", "the Amazon rainforest", "glaciers",
    "DNA", "antibiotics", "vaccines", "the brain", "sleep", "insomnia", "inflation", "taxes",
    "mortgages", "blockchain", "5G", "Wi-Fi", "Bluetooth", "Rust", "C++", "Git", "Hadoop", "Redis",
    "graph theory", "topology", "fractals", "chaos theory", "entropy", "magnetism", "electricity",
    "lasers", "nuclear fusion", "solar panels", "windmills", "submarines", "helicopters", "castles",
    "pyramids", "Shinto", "Stoicism", "feminism", "karate", "ballet", "origami", "gardening",
    "knitting", "poker", "soccer", "cricket", "olive oil", "honey", "spaghetti", "ramen", "tacos",
)

FRAMES: tuple[str, ...] = (
    "How do I {verb} a {noun}?", "How can I {verb} my {noun}?", "Why is the {noun} {adj}?",
    "Why do people {verb}?", "Why does a {noun} {verb}?", "Who is {name}?", "Who was {name}?",
    "When was {name} born?", "Where is {x}?", "Where can I buy a {adj} {noun}?",
    "What should I {verb} today?", "What is the best {noun}?", "What is the meaning of {x}?",
    "What is the difference between {x} and {y}?", "What is your favourite {noun}?",
    "What time is it?", "What is the weather like in {country}?", "What happened in {a}?",
    "How many {noun}s are there in {country}?", "How much does a {noun} cost?",
    "How old is {name}?", "How far is {country}?", "How does a {noun} work?", "How tall is {name}?",
    "Can you {verb} a {noun} for me?", "Can a {noun} {verb}?", "Could you help me with {x}?",
    "Could you {verb} my {noun}, please?", "Do you like {x}?", "Do you know {name}?",
    "Are you {adj}?", "Is {name} {adj}?", "Is {x} {adj}?", "Should I {verb} my {noun}?",
    "I need a {adj} {noun}.", "I want to {verb}.", "I am {adj}.", "I am looking for a {adj} {noun}.",
    "My {noun} is {adj}. What should I do?", "My {noun} does not {verb}. Help!",
    "My name is {name}.", "I think that {x} is {adj}.", "Please {verb} the {noun}.",
    "Write a poem about {x}.", "Write a story about a {adj} {noun}.", "Write an email to {name}.",
    "Write an essay on {x}.", "Write a short song about {x} and {y}.", "Write me a {adj} joke.",
    "Tell me a joke.", "Tell me a joke about {x}.", "Tell me a story.", "Tell me something {adj}.",
    "Give me a recipe for {noun} with {noun}.", "Give me {n} ideas for a {adj} {noun}.",
    "List {n} facts about {x}.", "List the {noun}s of {country}.", "Name {n} {adj} {noun}s.",
    "Translate '{noun}' into French.", "Translate this into German: I {verb} a {adj} {noun}.",
    "Summarize the story of {name}.", "Summarize {x} in {n} words.", "Compare {x} with {y}.",
    "Make a plan to {verb} in {country}.", "Plan a trip to {country}.", "Recommend a {adj} {noun}.",
    "Act as a {noun} and {verb}.", "Pretend to be {name}.", "Imagine a {adj} {noun}. What happens?",
    "Is it {adj} to {verb} a {noun}?", "Which {noun} is {adj}?", "Which is better, {x} or {y}?",
    "Whose {noun} is this?", "The {adj} {noun} will {verb}", "Once upon a time there was a {noun}",
    "The {noun} of {country} is", "{x}", "{name}", "{name} and {name}", "{x} or {y}?", "{noun}?",
    "{x} vs {y}", "{adj} {noun}", "best {noun} in {country}", "how to {verb} a {noun}", "why {x}",
    "Yes", "No", "Ok", "Maybe.", "Sure", "What?", "Why?", "Really?", "test", "Test 123", "asdf",
    "Please continue.", "Go on", "More", "I do not understand.", "That is {adj}.", "You are {adj}!",
    "Stop it", "Ping", "foo bar", "lorem ipsum dolor sit amet", "Say {word}.", "Repeat: {word}",
    "What does {word} mean?", "What is {word}?", "Who invented the {noun}?", "Who won the {noun}?",
    "Who wrote {x}?", "Who is the president of {country}?", "What language is spoken in {country}?",
    "What is the population of {country}?", "What is the currency of {country}?",
    "What is the largest {noun} in the world?", "What colour is a {noun}?", "Find all {adj} {noun}s.",
    "Explain why a {noun} can {verb}.", "Explain to {name} how to {verb}.", "Solve x + {a} = {b}.",
    "What is the square root of {a}?", "What is {a} divided by {n}?", "Convert {a} dollars to euros.",
    "Is {a} a prime number?", "How many days are in {n} months?", "What day is today?",
    "What is {n} percent of {a}?", "{a}", "{a} {b}", "{a}/{n}", "{n}%", "2+", "= {a}",
    "You are a helpful {noun}. {verb} it.", "### Question: why {verb}? ### Answer:",
    "Q: Is {x} {adj}? A:", "A: {x}. B: {y}. Which one?", "Dear {name}, I {verb} your {noun}.",
    "What rhymes with {noun}?", "Use {noun} in a sentence.", "What is the plural of {noun}?",
    "Correct this: he {verb} the {noun} yesterday", "Is this {adj}: {word}?", "Draw a {noun}.",
)

NEAR_FRAMES: tuple[str, ...] = (
    "Tell me about {x}", "Tell me about {x}.", "Tell me more about {x}.", "Describe {x}.",
    "Write a paragraph about {x}.", "What do you know about {x}?", "What is {x}?", "What are {x}?",
    "Explain {x}.", "Define {x}.", "Explain {x} in simple words.", "In one sentence, what is {x}?",
    "Give a short definition of {x}.", "Tell me about {name}", "Tell me about {name}.",
    "What is the capital of {country}?", "Name the capital of {country}.", "Tell me the capital of {country}.",
    "Which city is the capital of {country}?", "Do you know the capital of {country}?",
    "What is the capital of {word}?", "Tell me about {country}", "Describe {country}.",
    "What is the opposite of {noun}?", "Name the opposite of {word}.", "Opposite of {noun}?",
    "Spell {word}.", "Spell the word {noun}.", "How do you spell {noun}?", "Please spell the word {word}.",
    "What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.", "What is {a} - {b}?", "{a} - {b} =",
    "What is {a} plus {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.",
    "What is {a} * {b}?", "{a} * {b} =", "Multiply {a} by {b}.", "What is {a} times {b}?",
    "What number comes after {a}?", "Which is larger, {a} or {b}?", "Count from {a} to {b}.",
    "What is {a} + {n}?", "What is {n} + {a}?", "{n} * {a} =", "Sort these words: {noun} {noun} {noun}",
    "Sort {a} {b} {a}", "Sort {noun} {noun} {noun}", "Name the day {name} was born.",
    "What month is {adj}?", "It is {word}. What day is it?", "{word} is the capital of which country?",
    "Which country has the capital {word}?", "Is {noun} even or odd?", "Which is larger, {x} or {y}?",
)

SENTENCES: tuple[str, ...] = (
    "The {adj} {noun} was on the {noun}.", "{name} could not {verb} without a {noun}.",
    "In {country}, people {verb} every {noun}.", "It was a {adj} day and nobody wanted to {verb}.",
    "Then {name} and {name} began to {verb}.", "The report says that {x} is more {adj} than {y}.",
    "Since {a}, the {noun} has been {adj}.", "He said that the {noun} would {verb}.",
    "We need {n} {noun}s and one {adj} {noun}.", "A {noun} is a kind of {adj} {noun}.",
    "She had never seen such a {adj} {noun}.", "However, {x} did not {verb}.",
    "If you {verb} the {noun}, it will {verb}.", "Nothing about {x} is {adj}.",
    "The company sold {a} {noun}s last year.", "Why did the {noun} {verb}?",
)

SPEECH: tuple[str, ...] = (
    "¿Qué es {x}?", "¿Cómo estás?", "¿Cuál es la capital de {country}?", "Escribe un poema sobre {x}.",
    "Háblame de {x}.", "Quiero un {noun} para mi casa.", "¿Dónde está la biblioteca?", "No entiendo nada.",
    "Qu'est-ce que {x} ?", "Comment ça va ?", "Quelle est la capitale de {country} ?",
    "Parle-moi de {x}.", "Je voudrais un {noun}, s'il vous plaît.", "Écris une histoire sur {name}.",
    "Pourquoi le ciel est-il bleu ?", "Où est la gare ?",
    "Was ist {x}?", "Wie geht es dir?", "Was ist die Hauptstadt von {country}?", "Erzähl mir von {x}.",
    "Schreibe ein Gedicht über {x}.", "Ich möchte einen {noun} kaufen.", "Wer bist du denn?",
    "Warum ist der Himmel blau?", "Wie viel kostet das?", "Kannst du mir helfen?",
    "Che cos'è {x}?", "Come stai?", "Parlami di {x}.", "Qual è la capitale di {country}?",
    "Scrivi una poesia su {x}.", "Dove si trova {country}?", "Buongiorno, vorrei un {noun}.",
    "O que é {x}?", "Como vai você?", "Fale sobre {x}.", "Qual é a capital de {country}?",
    "Wat is {x}?", "Hoe gaat het met je?", "Vertel me over {x}.", "Waar woont {name}?",
    "Co to jest {x}?", "Jak się masz?", "Opowiedz mi o {x}.", "Gdzie jest {country}?",
    "{x} nedir?", "Nasılsın?", "Bana {x} hakkında bilgi ver.", "Türkiye'nin başkenti neresidir?",
    "Что такое {x}?", "Как дела?", "Расскажи мне о {x}.", "Напиши стихотворение про любовь.",
    "Где находится {country}?", "Почему небо голубое?", "Сколько это стоит?", "Я не понимаю.",
    "{x}是什么？", "你好吗？", "请告诉我关于{x}的事情。", "写一首诗。", "天空为什么是蓝色的？", "我想学习。",
    "{x}とは何ですか？", "お元気ですか？", "{x}について教えてください。", "日本の首都はどこですか？",
    "ما هو {x}؟", "كيف حالك؟", "أخبرني عن {x}.", "أين تقع {country}؟",
    "Wie heißt der König von {country}?", "¿Quién es {name}?", "Qui est {name} ?", "Chi è {name}?",
    "Quem é {name}?", "Wie is {name}?", "Kim {name}?", "Кто такой {name}?", "谁是{name}？",
    "Quanto fa {a} + {b}?", "Wie viel ist {a} plus {b}?", "Combien font {a} et {b} ?",
)

HELD_OUT_SPEECH: tuple[str, ...] = (
    "Vad är {x}?", "Hur mår du idag?", "Berätta om {x} för mig.", "Varför är himlen blå?",
    "Mikä on {x}?", "Mitä kuuluu?", "Kerro minulle jotain aiheesta {x}.", "Miksi taivas on sininen?",
    "Τι είναι το {x};", "Πώς είσαι σήμερα;", "Πες μου για {x}.", "Πού είναι η βιβλιοθήκη;",
    "{x}이란 무엇인가요?", "오늘 기분이 어때요?", "하늘은 왜 파란가요?", "시를 한 편 써 주세요.",
    "{x} क्या है?", "आप कैसे हैं?", "मुझे {x} के बारे में बताइए।", "आसमान नीला क्यों है?",
    "Mi az a {x}?", "Hogy vagy ma?", "Mesélj nekem erről: {x}.", "Co je to {x}?", "Jak se máte?",
    "מה זה {x}?", "{x} là gì?", "Bạn có khỏe không?", "Apa itu {x}?", "Bagaimana kabarmu hari ini?",
)

CODE: tuple[str, ...] = (
    "def {word}(x):\n    return x + {n}", "Write a Python function that can {verb} a {noun}.",
    "import os\nfor {noun} in range({n}):\n    print({noun})", "print('{word}')",
    "What does this code do?\nfor i in range({n}):\n    {word}(i)", "class {word}:\n    pass",
    "SELECT {noun} FROM {word} WHERE id = {a};", "How do I sort a list in JavaScript?",
    "function {word}(a, b) {{ return a * b; }}", "const {noun} = require('{word}');",
    "<div class=\"{word}\"><p>{x}</p></div>", "{{\"{noun}\": {a}, \"{word}\": \"{x}\"}}",
    "ls -la /usr/{word}", "git commit -m '{verb} {noun}'", "sudo apt install {word}",
    "Error: {word} is not defined", "Traceback (most recent call last): KeyError: '{word}'",
    "Fix this bug: {word}.{verb}() returns None", "#include <stdio.h>\nint main() {{ return {n}; }}",
    "https://www.{word}.com/{noun}", "{word}@{word}.com", "docker run {word}", "x = {a}; y = {b}",
    "Write a regex for a {noun}.", "if ({noun} > {n}) {{ {verb}({noun}); }}", "## {x}\n\n- {y}",
    "What is the time complexity of {word} sort?", "Explain the error '{word}' in line {a}.",
)

HELD_OUT_CODE: tuple[str, ...] = (
    "fn {word}(x: i32) -> i32 {{ x * {n} }}", "let mut {noun} = Vec::new();",
    "package main\n\nfunc main() {{ fmt.Println(\"{word}\") }}", "public static void {word}(String s)",
    "{word} :: Int -> Int\n{word} x = x + {n}", "curl -X POST http://{word}:8000/{noun}",
    "pip install {word} && python -m {word}", "How do I {verb} a pointer in C?",
    "UPDATE {word} SET {noun} = {a}", "Refactor this: while (true) {{ {word}++; }}",
    "<?php echo ${word}; ?>", "kubectl get pods -n {word}",
)

HELD_OUT_FRAMES: tuple[str, ...] = (
    "What would {name} say about {x}?", "Have you ever seen a {noun}?", "Did {name} {verb}?",
    "Would you rather {verb} or {verb}?", "When does the {noun} open?", "At what age can you {verb}?",
    "Why was the {noun} invented?", "In which year did {name} {verb}?", "Suggest a name for my {noun}.",
    "Create a table of {noun}s.", "Help me {verb} a {adj} {noun}", "Teach me {x}.",
    "I lost my {noun} in {country}, any advice?", "Let us talk about {x}", "What makes a {noun} {adj}?",
    "Rewrite this sentence: the {noun} is {adj}.", "Is there a {noun} near me?", "So, {x}?",
    "Does {name} live in {country}?", "How long does it take to {verb}?", "How was your day?",
    "Argue for and against {x}.", "Brainstorm uses of a {noun}.", "Classify: '{adj} {noun}'",
    "What are the symptoms of {x}?", "Outline a talk on {x}.", "Will it rain in {country} tomorrow?",
    "Complete: the {noun} is", "Sing!", "Nice {noun}, {name}", "Where do {noun}s come from?",
)

SYLLABLES: tuple[str, ...] = tuple("""
ka lo mi ter bra sun del fi gro han is jo ko lam mon ne or pli qua ris sta tu ul ven wex ya zor ash
ble cro dri el fla gan hy in ku les mar nor ock pra ru shi tha um vi wor yl zen ard bo chi do ek
""".split())

LETTERS: tuple[str, ...] = (
    "abcdefghijklmnopqrstuvwxyz", "asdfghjkl", "qwertyuiop", "abcdefghijklmnopqrstuvwxyz     ",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789abcdef", "!?.,;:-_#*+~/()=&%$", "😀😂🙂❤👍🎉🔥 ", "0123456789",
)
# fmt: on
