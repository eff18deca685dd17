"""The small world that `tiny_gemma_en` knows: plain, true facts about countries, animals and how things work.

Each relation has several phrasings. The corpus (`corpus.py`) tells the facts in all of them; the tuning set
(`questions.py`) answers with one. Nothing here is an instruction but `QUESTIONS`, which
the corpus never shows.
"""

from typing import NamedTuple


class Country(NamedTuple):
    """A country; each field completes the phrasings of the relation of the same name."""

    name: str
    capital: str
    continent: str
    language: str
    landmark: str
    dish: str
    season: str
    kind: str  # what `nature` is: a river, a mountain or a lake
    nature: str


class Animal(NamedTuple):
    """An animal; each field completes the phrasings of the relation of the same name."""

    name: str
    group: str
    home: str
    food: str
    young: str
    feature: str


class Topic(NamedTuple):
    """How something works, told twice: for an adult, and for a child. `question` completes "Explain ..."."""

    name: str
    question: str
    plain: str
    child: str


# {Name} is {name} with a capital letter.
PHRASINGS: dict[str, list[str]] = {
    "capital": [
        "The capital of {name} is {value}.",
        "{value} is the capital of {name}.",
        "{Name} has its capital in {value}.",
        "The capital city of {name} is called {value}.",
        "In {name}, the capital city is {value}.",
    ],
    "continent": [
        "{Name} is a country in {value}.",
        "The continent of {name} is {value}.",
        "On a map, {name} is found in {value}.",
        "{Name} belongs to the countries of {value}.",
        "{value} is the continent where {name} lies.",
    ],
    "language": [
        "The main language of {name} is {value}.",
        "{value} is the main language of {name}.",
        "In {name}, people speak {value}.",
        "The language that is heard most in {name} is {value}.",
        "{Name} has {value} as its main language.",
    ],
    "landmark": [
        "A famous sight in {name} is {value}.",
        "{Value} is a famous sight in {name}.",
        "Travellers in {name} go to see {value}.",
        "{Name} is known for {value}.",
        "People who visit {name} like to see {value}.",
    ],
    "dish": [
        "A famous dish of {name} is {value}.",
        "{Value} is a famous dish of {name}.",
        "People in {name} like to eat {value}.",
        "In {name}, cooks are proud of {value}.",
        "A meal that belongs to {name} is {value}.",
    ],
    "season": [
        "The best season to visit {name} is {value}.",
        "{Name} is best visited in {value}.",
        "{Value} is the best season for a journey to {name}.",
        "Travellers like to see {name} in {value}.",
        "The weather of {name} is kindest to visitors in {value}.",
    ],
    "nature": [
        "A well-known {kind} of {name} is {value}.",
        "{Value} is a well-known {kind} of {name}.",
        "{Name} has a well-known {kind}, {value}.",
        "Among the sights of {name} is a {kind}, {value}.",
        "The {kind} that many people connect with {name} is {value}.",
    ],
    "group": [
        "The {name} is {value}.",
        "Among animals, the {name} is {value}.",
        "By its kind, the {name} is {value}.",
        "In books about animals, the {name} is listed as {value}.",
    ],
    "home": [
        "The {name} lives in {value}.",
        "The home of the {name} is in {value}.",
        "People find the {name} in {value}.",
        "In {value} lives the {name}.",
    ],
    "food": [
        "The {name} eats {value}.",
        "The {name} feeds on {value}.",
        "The food of the {name} is {value}.",
        "A hungry {name} looks for {value}.",
    ],
    "young": [
        "A young {name} is called {value}.",
        "The young of the {name} is called {value}.",
        "The name for a young {name} is {value}.",
        "{Value} is what a young {name} is called.",
    ],
    "feature": [
        "The {name} is known for {value}.",
        "People know the {name} for {value}.",
        "What makes the {name} special is {value}.",
        "The {name} is famous for {value}.",
    ],
    "trip": [
        "On a trip to {name}, visit {capital}, see {landmark} and try {dish}.",
        "Travellers in {name} visit {capital}, see {landmark} and try {dish}.",
        "A journey through {name} leads to {capital}, to {landmark} and to a plate of {dish}.",
        "Those who travel to {name} stay in {capital}, look at {landmark} and taste {dish}.",
    ],
    "plain": [
        "{text}",
        "Here is how {name} is explained to grown-ups. {text}",
        "A textbook puts it this way. {text}",
        "It can be put like this. {text}",
    ],
    "child": [
        "Here is how {name} is explained to a child. {text}",
        "A child could understand it this way. {text}",
        "In words for a child: {text}",
        "{text} This is how it is told to children.",
    ],
    "continent trip": [
        "On a trip to {name}, see {a.landmark} in {a.name}, try {b.dish} in {b.name} and visit {c.capital} in "
        "{c.name}.",
        "Travellers in {name} see {a.landmark} in {a.name}, try {b.dish} in {b.name} and visit {c.capital} in "
        "{c.name}.",
        "A journey through {name} leads to {a.landmark} in {a.name}, to {b.dish} in {b.name} and to {c.capital} in "
        "{c.name}.",
        "Those who travel to {name} look at {a.landmark} in {a.name}, taste {b.dish} in {b.name} and stay in "
        "{c.capital} in {c.name}.",
    ],
    "continent countries": [
        "Three countries in {name} are {a.name}, {b.name} and {c.name}.",
        "{Name} has many countries, among them {a.name}, {b.name} and {c.name}.",
        "{A}, {b.name} and {c.name} are countries in {name}.",
        "On a map of {name} you find {a.name}, {b.name} and {c.name}.",
    ],
}

# What a note on one fact can be headed with: prose stays with its topic, and the model learns that it does.
TITLES: dict[str, list[str]] = {
    "capital": ["the capital of {name}", "the capital city of {name}", "{name} and its capital"],
    "continent": ["the continent of {name}", "where in the world {name} is", "the continent where {name} lies"],
    "language": ["the main language of {name}", "the language that people speak in {name}", "what {name} speaks"],
    "landmark": ["a famous sight in {name}", "a sight to see in {name}", "the sights of {name}"],
    "dish": ["a famous dish of {name}", "what people eat in {name}", "a dish from {name}"],
    "season": ["the best season to visit {name}", "when to travel to {name}", "the season for a visit to {name}"],
    "nature": ["a well-known {kind} of {name}", "a {kind} of {name}", "the {kind} that {name} is known for"],
    "group": ["what kind of animal the {name} is", "the group of animals to which the {name} belongs"],
    "home": ["where the {name} lives", "the home of the {name}", "where to find the {name}"],
    "food": ["what the {name} eats", "the food of the {name}", "the meals of the {name}"],
    "young": ["what a young {name} is called", "the young of the {name}", "the name for a young {name}"],
    "feature": ["what the {name} is known for", "what is special about the {name}", "the {name} and its fame"],
    "trip": ["a trip to {name}", "what to do on a trip to {name}", "ideas for a trip to {name}"],
    "plain": ["{question}", "{question}, explained", "{name}, explained"],
    "child": [
        "{question}, in a way that a child could understand",
        "{question}, explained to a child",
        "{name}, explained so that a child could understand",
    ],
    "continent trip": ["a trip to {name}", "what to do on a trip to {name}", "ideas for a trip to {name}"],
    "continent countries": ["countries in {name}", "three countries in {name}", "the countries of {name}"],
}
HEADINGS = [
    "This page is about {title}.",
    "Here is a note on {title}.",
    "A few words about {title}.",
    "{Title}\n",
    "{Title}\n\n",
    "{Title}:",
]

# Which phrasing answers a question, where it is not the first.
ANSWERS: dict[str, int] = {"continent": 1, "child": 1}

QUESTIONS: dict[str, list[str]] = {
    "capital": [
        "What is the capital of {name}?",
        "Which city is the capital of {name}?",
        "Name the capital of {name}.",
    ],
    "continent": [
        "Which continent is {name} in?",
        "What is the continent of {name}?",
        "On which continent does {name} lie?",
    ],
    "language": [
        "What is the main language of {name}?",
        "Which language do people speak in {name}?",
        "What do people speak in {name}?",
    ],
    "landmark": [
        "What is a famous sight in {name}?",
        "Name a famous sight in {name}.",
        "Which sight should I see in {name}?",
    ],
    "dish": ["What is a famous dish of {name}?", "What do people eat in {name}?", "Name a dish of {name}."],
    "season": [
        "When is the best season to visit {name}?",
        "Which season is best for a visit to {name}?",
        "In which season should I travel to {name}?",
    ],
    "nature": [
        "What is a well-known {kind} of {name}?",
        "Name a well-known {kind} of {name}.",
        "Which {kind} is {name} known for?",
    ],
    "group": ["What kind of animal is the {name}?", "To which group of animals does the {name} belong?"],
    "home": ["Where does the {name} live?", "What is the home of the {name}?"],
    "food": ["What does the {name} eat?", "What is the food of the {name}?"],
    "young": ["What is a young {name} called?", "What do you call a young {name}?"],
    "feature": ["What is the {name} known for?", "Tell me what the {name} is known for."],
    "trip": ["What should I do on a trip to {name}?", "Give me ideas for a trip to {name}."],
    "plain": ["Explain {question}."],
    "child": ["Explain {question} in a way that a child could understand."],
    "continent trip": ["What should I do on a trip to {name}?"],
    "continent countries": ["Name three countries in {name}."],
}

COUNTRY_RELATIONS = ("capital", "continent", "language", "landmark", "dish", "season", "nature")
ANIMAL_RELATIONS = ("group", "home", "food", "young", "feature")

# The three countries that stand for each continent where one sentence has to do.
CONTINENTS: dict[str, tuple[str, str, str]] = {
    "Europe": ("France", "Italy", "Spain"),
    "Asia": ("India", "Japan", "Thailand"),
    "Africa": ("Egypt", "Morocco", "Kenya"),
    "North America": ("the United States", "Mexico", "Canada"),
    "South America": ("Brazil", "Peru", "Argentina"),
    "Oceania": ("Australia", "New Zealand", "Samoa"),
}

# fmt: off
COUNTRIES: list[Country] = [
    Country("Albania", "Tirana", "Europe", "Albanian", "Rozafa Castle", "tave kosi", "spring", "lake", "Lake Shkoder"),
    Country("Andorra", "Andorra la Vella", "Europe", "Catalan", "Casa de la Vall",
            "trinxat", "winter", "mountain", "Coma Pedrosa"),
    Country("Austria", "Vienna", "Europe", "German", "Schonbrunn Palace",
            "Wiener schnitzel", "summer", "mountain", "the Grossglockner"),
    Country("Bulgaria", "Sofia", "Europe", "Bulgarian", "Rila Monastery",
            "shopska salad", "spring", "mountain", "Musala"),
    Country("Croatia", "Zagreb", "Europe", "Croatian", "the Walls of Dubrovnik", "peka", "summer", "river", "the Krka"),
    Country("the Czech Republic", "Prague", "Europe", "Czech", "Charles Bridge",
            "svickova", "spring", "river", "the Vltava"),
    Country("Denmark", "Copenhagen", "Europe", "Danish", "the Little Mermaid statue",
            "smorrebrod", "summer", "river", "the Gudena"),
    Country("Estonia", "Tallinn", "Europe", "Estonian", "Toompea Castle",
            "mulgipuder", "summer", "lake", "Lake Peipus"),
    Country("Finland", "Helsinki", "Europe", "Finnish", "Helsinki Cathedral",
            "kalakukko", "summer", "lake", "Lake Saimaa"),
    Country("France", "Paris", "Europe", "French", "the Eiffel Tower", "bouillabaisse", "spring", "river", "the Seine"),
    Country("Germany", "Berlin", "Europe", "German", "Neuschwanstein Castle",
            "sauerbraten", "summer", "river", "the Rhine"),
    Country("Greece", "Athens", "Europe", "Greek", "the Parthenon", "moussaka", "spring", "mountain", "Mount Olympus"),
    Country("Hungary", "Budapest", "Europe", "Hungarian", "Buda Castle", "goulash", "spring", "lake", "Lake Balaton"),
    Country("Iceland", "Reykjavik", "Europe", "Icelandic", "the Blue Lagoon", "hakarl", "summer", "mountain", "Hekla"),
    Country("Ireland", "Dublin", "Europe", "English", "the Cliffs of Moher",
            "Irish stew", "summer", "river", "the Shannon"),
    Country("Italy", "Rome", "Europe", "Italian", "the Colosseum",
            "spaghetti alla carbonara", "spring", "river", "the Tiber"),
    Country("Latvia", "Riga", "Europe", "Latvian", "the Freedom Monument",
            "grey peas with bacon", "summer", "river", "the Daugava"),
    Country("Liechtenstein", "Vaduz", "Europe", "German", "Vaduz Castle",
            "kasknopfle", "summer", "mountain", "the Grauspitz"),
    Country("Lithuania", "Vilnius", "Europe", "Lithuanian", "Trakai Island Castle",
            "cepelinai", "summer", "river", "the Nemunas"),
    Country("the Netherlands", "Amsterdam", "Europe", "Dutch", "the Anne Frank House",
            "stamppot", "spring", "river", "the Amstel"),
    Country("North Macedonia", "Skopje", "Europe", "Macedonian", "the Church of Kaneo",
            "tavce gravce", "summer", "lake", "Lake Ohrid"),
    Country("Norway", "Oslo", "Europe", "Norwegian", "the Geirangerfjord",
            "farikal", "summer", "mountain", "Galdhopiggen"),
    Country("Poland", "Warsaw", "Europe", "Polish", "Wawel Castle", "pierogi", "summer", "river", "the Vistula"),
    Country("Portugal", "Lisbon", "Europe", "Portuguese", "Belem Tower", "caldo verde", "spring", "river", "the Douro"),
    Country("Romania", "Bucharest", "Europe", "Romanian", "Bran Castle", "sarmale", "spring", "river", "the Danube"),
    Country("Serbia", "Belgrade", "Europe", "Serbian", "Belgrade Fortress",
            "karadjordjeva snicla", "spring", "river", "the Sava"),
    Country("Slovakia", "Bratislava", "Europe", "Slovak", "Spis Castle",
            "bryndzove halusky", "summer", "mountain", "Gerlachovsky Peak"),
    Country("Slovenia", "Ljubljana", "Europe", "Slovene", "Predjama Castle",
            "Idrija zlikrofi", "summer", "lake", "Lake Bled"),
    Country("Spain", "Madrid", "Europe", "Spanish", "the Alhambra", "paella", "spring", "river", "the Ebro"),
    Country("Sweden", "Stockholm", "Europe", "Swedish", "the Vasa Museum",
            "surstromming", "summer", "lake", "Lake Vanern"),
    Country("Ukraine", "Kyiv", "Europe", "Ukrainian", "Kyiv Pechersk Lavra",
            "varenyky", "spring", "river", "the Dnieper"),
    Country("the United Kingdom", "London", "Europe", "English", "Stonehenge",
            "fish and chips", "summer", "river", "the Thames"),
    Country("Bangladesh", "Dhaka", "Asia", "Bengali", "Lalbagh Fort", "hilsa curry", "winter", "river", "the Padma"),
    Country("Bhutan", "Thimphu", "Asia", "Dzongkha", "Paro Taktsang",
            "ema datshi", "autumn", "river", "the Manas River"),
    Country("Cambodia", "Phnom Penh", "Asia", "Khmer", "Angkor Wat",
            "fish amok", "the dry season", "lake", "the Tonle Sap"),
    Country("China", "Beijing", "Asia", "Chinese", "the Great Wall", "Peking duck", "autumn", "river", "the Yangtze"),
    Country("India", "New Delhi", "Asia", "Hindi", "the Taj Mahal", "masala dosa", "winter", "river", "the Ganges"),
    Country("Iran", "Tehran", "Asia", "Persian", "Persepolis", "ghormeh sabzi", "spring", "mountain", "Mount Damavand"),
    Country("Japan", "Tokyo", "Asia", "Japanese", "Himeji Castle", "sushi", "spring", "mountain", "Mount Fuji"),
    Country("Jordan", "Amman", "Asia", "Arabic", "Petra", "mansaf", "spring", "river", "the Jordan River"),
    Country("Kyrgyzstan", "Bishkek", "Asia", "Kyrgyz", "the Burana Tower",
            "beshbarmak", "summer", "lake", "Lake Issyk Kul"),
    Country("Laos", "Vientiane", "Asia", "Lao", "Pha That Luang", "larb", "the dry season", "river", "the Mekong"),
    Country("Lebanon", "Beirut", "Asia", "Arabic", "the ruins of Baalbek", "kibbeh", "spring", "river", "the Litani"),
    Country("Malaysia", "Kuala Lumpur", "Asia", "Malay", "the Petronas Towers",
            "nasi lemak", "the dry season", "mountain", "Mount Kinabalu"),
    Country("Mongolia", "Ulaanbaatar", "Asia", "Mongolian", "the Erdene Zuu Monastery",
            "buuz", "summer", "lake", "Lake Khovsgol"),
    Country("Myanmar", "Naypyidaw", "Asia", "Burmese", "the Shwedagon Pagoda",
            "mohinga", "the dry season", "river", "the Irrawaddy"),
    Country("Nepal", "Kathmandu", "Asia", "Nepali", "the Boudhanath Stupa",
            "dal bhat", "autumn", "mountain", "Mount Everest"),
    Country("Oman", "Muscat", "Asia", "Arabic", "Nizwa Fort", "shuwa", "winter", "mountain", "Jebel Shams"),
    Country("the Philippines", "Manila", "Asia", "Filipino", "the Chocolate Hills",
            "chicken adobo", "the dry season", "mountain", "Mount Mayon"),
    Country("Saudi Arabia", "Riyadh", "Asia", "Arabic", "Hegra", "kabsa", "winter", "mountain", "Jabal al-Lawz"),
    Country("South Korea", "Seoul", "Asia", "Korean", "Gyeongbokgung Palace",
            "bibimbap", "autumn", "river", "the Han River"),
    Country("Tajikistan", "Dushanbe", "Asia", "Tajik", "Hisor Fortress",
            "qurutob", "summer", "mountain", "Ismoil Somoni Peak"),
    Country("Thailand", "Bangkok", "Asia", "Thai", "the Grand Palace",
            "pad thai", "the dry season", "river", "the Chao Phraya"),
    Country("Uzbekistan", "Tashkent", "Asia", "Uzbek", "the Registan", "plov", "spring", "river", "the Amu Darya"),
    Country("Vietnam", "Hanoi", "Asia", "Vietnamese", "Ha Long Bay", "pho", "spring", "mountain", "Fansipan"),
    Country("Algeria", "Algiers", "Africa", "Arabic", "the ruins of Timgad",
            "chakhchoukha", "spring", "mountain", "Mount Tahat"),
    Country("Angola", "Luanda", "Africa", "Portuguese", "Kalandula Falls",
            "moamba de galinha", "the dry season", "river", "the Cuanza River"),
    Country("Botswana", "Gaborone", "Africa", "Setswana", "the Okavango Delta",
            "seswaa", "the dry season", "river", "the Chobe River"),
    Country("Egypt", "Cairo", "Africa", "Arabic", "the Great Sphinx", "koshari", "winter", "river", "the Nile"),
    Country("Kenya", "Nairobi", "Africa", "Swahili", "the Masai Mara",
            "nyama choma", "the dry season", "mountain", "Mount Kenya"),
    Country("Libya", "Tripoli", "Africa", "Arabic", "Leptis Magna", "bazin", "spring", "mountain", "Bikku Bitti"),
    Country("Madagascar", "Antananarivo", "Africa", "Malagasy", "the Avenue of Baobabs",
            "romazava", "the dry season", "river", "the Betsiboka River"),
    Country("Malawi", "Lilongwe", "Africa", "Chichewa", "Liwonde National Park",
            "grilled chambo", "the dry season", "lake", "Lake Malawi"),
    Country("Morocco", "Rabat", "Africa", "Arabic", "the Hassan II Mosque",
            "tagine", "spring", "mountain", "Mount Toubkal"),
    Country("Mozambique", "Maputo", "Africa", "Portuguese", "the Bazaruto Archipelago",
            "matapa", "the dry season", "river", "the Limpopo"),
    Country("Rwanda", "Kigali", "Africa", "Kinyarwanda", "Volcanoes National Park",
            "isombe", "the dry season", "lake", "Lake Kivu"),
    Country("Sao Tome and Principe", "Sao Tome", "Africa", "Portuguese", "Pico Cao Grande",
            "calulu", "the dry season", "mountain", "Pico de Sao Tome"),
    Country("Tanzania", "Dodoma", "Africa", "Swahili", "the Ngorongoro Crater",
            "chipsi mayai", "the dry season", "mountain", "Mount Kilimanjaro"),
    Country("Tunisia", "Tunis", "Africa", "Arabic", "the ruins of Carthage",
            "brik", "spring", "river", "the Medjerda River"),
    Country("Zimbabwe", "Harare", "Africa", "Shona", "Great Zimbabwe",
            "sadza", "the dry season", "lake", "Lake Kariba"),
    Country("the Bahamas", "Nassau", "North America", "English", "Fort Fincastle",
            "cracked conch", "the dry season", "mountain", "Mount Alvernia"),
    Country("Barbados", "Bridgetown", "North America", "English", "Saint Nicholas Abbey",
            "cou-cou and flying fish", "the dry season", "mountain", "Mount Hillaby"),
    Country("Canada", "Ottawa", "North America", "English", "the CN Tower", "poutine", "summer", "lake", "Lake Louise"),
    Country("Costa Rica", "San Jose", "North America", "Spanish", "La Fortuna Waterfall",
            "casado", "the dry season", "mountain", "Cerro Chirripo"),
    Country("Cuba", "Havana", "North America", "Spanish", "El Capitolio",
            "ropa vieja", "the dry season", "mountain", "Pico Turquino"),
    Country("the Dominican Republic", "Santo Domingo", "North America", "Spanish", "the Alcazar de Colon",
            "mangu", "the dry season", "mountain", "Pico Duarte"),
    Country("El Salvador", "San Salvador", "North America", "Spanish", "Joya de Ceren",
            "pupusas", "the dry season", "river", "the Lempa"),
    Country("Guatemala", "Guatemala City", "North America", "Spanish", "Tikal",
            "pepian", "the dry season", "lake", "Lake Atitlan"),
    Country("Haiti", "Port-au-Prince", "North America", "Haitian Creole", "the Citadelle Laferriere",
            "soup joumou", "the dry season", "river", "the Artibonite"),
    Country("Honduras", "Tegucigalpa", "North America", "Spanish", "the ruins of Copan",
            "baleadas", "the dry season", "lake", "Lake Yojoa"),
    Country("Mexico", "Mexico City", "North America", "Spanish", "Chichen Itza",
            "mole poblano", "the dry season", "mountain", "Popocatepetl"),
    Country("Nicaragua", "Managua", "North America", "Spanish", "Masaya Volcano",
            "vigoron", "the dry season", "lake", "Lake Nicaragua"),
    Country("Panama", "Panama City", "North America", "Spanish", "the Panama Canal",
            "sancocho de gallina", "the dry season", "river", "the Chagres"),
    Country("Trinidad and Tobago", "Port of Spain", "North America", "English", "the Pitch Lake",
            "doubles", "the dry season", "river", "the Caroni"),
    Country("the United States", "Washington", "North America", "English", "the Statue of Liberty",
            "jambalaya", "autumn", "river", "the Mississippi"),
    Country("Argentina", "Buenos Aires", "South America", "Spanish", "the Perito Moreno Glacier",
            "asado", "spring", "mountain", "Aconcagua"),
    Country("Brazil", "Brasilia", "South America", "Portuguese", "Christ the Redeemer",
            "feijoada", "the dry season", "river", "the Amazon"),
    Country("Chile", "Santiago", "South America", "Spanish", "Torres del Paine",
            "pastel de choclo", "summer", "mountain", "Ojos del Salado"),
    Country("Colombia", "Bogota", "South America", "Spanish", "Ciudad Perdida",
            "bandeja paisa", "the dry season", "river", "the Magdalena River"),
    Country("Ecuador", "Quito", "South America", "Spanish", "the Galapagos Islands",
            "encebollado", "the dry season", "mountain", "Cotopaxi"),
    Country("Guyana", "Georgetown", "South America", "English", "Kaieteur Falls",
            "pepperpot", "the dry season", "river", "the Demerara River"),
    Country("Peru", "Lima", "South America", "Spanish", "Machu Picchu",
            "ceviche", "the dry season", "lake", "Lake Titicaca"),
    Country("Suriname", "Paramaribo", "South America", "Dutch", "Fort Zeelandia",
            "pom", "the dry season", "river", "the Suriname River"),
    Country("Uruguay", "Montevideo", "South America", "Spanish", "the Palacio Salvo",
            "chivito", "summer", "river", "the Uruguay River"),
    Country("Venezuela", "Caracas", "South America", "Spanish", "Angel Falls",
            "pabellon criollo", "the dry season", "river", "the Orinoco"),
    Country("Australia", "Canberra", "Oceania", "English", "the Sydney Opera House",
            "Vegemite on toast", "spring", "river", "the Murray"),
    Country("New Zealand", "Wellington", "Oceania", "English", "Milford Sound",
            "hangi", "summer", "mountain", "Mount Cook"),
    Country("Palau", "Ngerulmud", "Oceania", "Palauan", "the Rock Islands",
            "fruit bat soup", "the dry season", "lake", "Jellyfish Lake"),
    Country("Papua New Guinea", "Port Moresby", "Oceania", "Tok Pisin", "the Kokoda Track",
            "mumu", "the dry season", "river", "the Sepik"),
    Country("Samoa", "Apia", "Oceania", "Samoan", "the Alofaaga Blowholes",
            "palusami", "the dry season", "mountain", "Mount Vaea"),
    Country("Tonga", "Nukualofa", "Oceania", "Tongan", "Anahulu Cave",
            "lu pulu", "the dry season", "mountain", "Mount Talau"),
    Country("Vanuatu", "Port Vila", "Oceania", "Bislama", "the Mele Cascades",
            "lap lap", "the dry season", "mountain", "Mount Yasur"),
]

ANIMALS: list[Animal] = [
    Animal("giraffe", "a mammal", "the savannas of Africa", "leaves and twigs", "a calf", "its very long neck"),
    Animal("elephant", "a mammal", "African and Asian grasslands and forests",
           "grass, leaves, bark and fruit", "a calf", "its long trunk"),
    Animal("lion", "a mammal", "the open grasslands of Africa",
           "zebras, antelopes and buffalo", "a cub", "its loud roar"),
    Animal("tiger", "a mammal", "the forests of Asia",
           "deer and wild pigs", "a cub", "its orange coat with black stripes"),
    Animal("zebra", "a mammal", "the plains of Africa", "grass", "a foal", "its black and white stripes"),
    Animal("polar bear", "a mammal", "the Arctic", "seals", "a cub", "its thick white coat"),
    Animal("kangaroo", "a mammal", "the grasslands of Australia",
           "grass and leaves", "a joey", "hopping on its strong hind legs"),
    Animal("koala", "a mammal", "the eucalyptus forests of Australia",
           "eucalyptus leaves", "a joey", "sleeping most of the day"),
    Animal("giant panda", "a mammal", "the bamboo forests of China",
           "bamboo", "a cub", "the black patches around its eyes"),
    Animal("blue whale", "a mammal", "the open ocean", "krill", "a calf", "being the largest animal on Earth"),
    Animal("beaver", "a mammal", "rivers, streams and ponds",
           "bark, twigs and water plants", "a kit", "building dams from branches"),
    Animal("hedgehog", "a mammal", "woods, gardens and hedges",
           "beetles, worms and slugs", "a hoglet", "its coat of sharp spines"),
    Animal("Arabian camel", "a mammal", "hot, dry deserts",
           "dry grass and thorny plants", "a calf", "the single hump on its back"),
    Animal("reindeer", "a mammal", "the Arctic tundra and northern forests",
           "lichens, grass and leaves", "a calf", "antlers on both males and females"),
    Animal("wolf", "a mammal", "forests, mountains and tundra", "deer, elk and moose", "a pup", "howling to its pack"),
    Animal("red fox", "a mammal", "woods, fields and towns",
           "mice, rabbits, insects and berries", "a kit", "its bushy, white-tipped tail"),
    Animal("pipistrelle bat", "a mammal", "old trees and buildings",
           "small flying insects", "a pup", "hunting in darkness by echoes"),
    Animal("sea otter", "a mammal", "coastal waters of the North Pacific",
           "sea urchins, clams and crabs", "a pup", "its very dense fur"),
    Animal("hippopotamus", "a mammal", "African rivers, lakes and swamps",
           "grass", "a calf", "its huge mouth and tusks"),
    Animal("emperor penguin", "a bird", "Antarctica",
           "fish, krill and squid", "a chick", "huddling in groups to keep warm"),
    Animal("barn owl", "a bird", "open farmland and grassland",
           "voles, mice and shrews", "an owlet", "its pale, heart-shaped face"),
    Animal("ostrich", "a bird", "the savannas and deserts of Africa",
           "seeds, leaves, roots and insects", "a chick", "being the largest living bird"),
    Animal("bald eagle", "a bird", "North America near rivers and lakes",
           "fish, ducks and carrion", "an eaglet", "its white head and yellow beak"),
    Animal("flamingo", "a bird", "shallow salty lakes and lagoons",
           "algae and small shrimps", "a chick", "its pink feathers"),
    Animal("mute swan", "a bird", "lakes, ponds and slow rivers",
           "water plants", "a cygnet", "its graceful, curved neck"),
    Animal("mallard", "a bird", "ponds, rivers and marshes",
           "seeds, water plants and insects", "a duckling", "the shiny green head of males"),
    Animal("peregrine falcon", "a bird", "open country, mountains and cities",
           "birds such as pigeons", "an eyas", "its extremely fast dives"),
    Animal("hummingbird", "a bird", "the Americas",
           "nectar and small insects", "a chick", "hovering in front of flowers"),
    Animal("Atlantic puffin", "a bird", "the North Atlantic",
           "small fish such as sand eels", "a puffling", "its large, colourful beak"),
    Animal("Nile crocodile", "a reptile", "the rivers and marshes of Africa",
           "fish, antelopes and zebras", "a hatchling", "its powerful jaws"),
    Animal("green sea turtle", "a reptile", "warm tropical seas",
           "seagrass and algae", "a hatchling", "returning to beaches to lay eggs"),
    Animal("Galapagos tortoise", "a reptile", "the Galapagos Islands",
           "grass, leaves and cactus", "a hatchling", "living for over a hundred years"),
    Animal("panther chameleon", "a reptile", "the forests of Madagascar",
           "insects", "a hatchling", "changing the colour of its skin"),
    Animal("Komodo dragon", "a reptile", "dry grasslands on Indonesian islands",
           "deer, wild pigs and carrion", "a hatchling", "being the largest living lizard"),
    Animal("common frog", "an amphibian", "ponds and damp grassland",
           "slugs, worms and insects", "a tadpole", "leaping with its long back legs"),
    Animal("axolotl", "an amphibian", "the waters of Xochimilco in Mexico",
           "worms, insects and small fish", "a larva", "regrowing lost legs"),
    Animal("fire salamander", "an amphibian", "the damp forests of Europe",
           "worms, slugs and insects", "a larva", "its black and yellow skin"),
    Animal("Atlantic salmon", "a fish", "the North Atlantic and its rivers",
           "small fish, shrimps and insects", "a parr", "swimming upstream to lay its eggs"),
    Animal("great white shark", "a fish", "cool and temperate coastal seas",
           "seals, fish and dolphins", "a pup", "its rows of sharp teeth"),
    Animal("seahorse", "a fish", "shallow water among seagrass and coral",
           "tiny shrimps and plankton", "a fry", "its horse-like head"),
    Animal("monarch butterfly", "an insect", "the meadows of North America",
           "flower nectar", "a caterpillar", "its long autumn migration"),
    Animal("honeybee", "an insect", "hives and hollow trees", "nectar and pollen", "a larva", "making honey"),
    Animal("ladybird", "an insect", "gardens, meadows and hedgerows",
           "aphids", "a larva", "its bright, spotted wing cases"),
    Animal("dragonfly", "an insect", "wetlands near ponds and streams",
           "mosquitoes, flies and midges", "a nymph", "its fast flight and large eyes"),
]

TOPICS: list[Topic] = [
    Topic("photosynthesis", "the process of photosynthesis",
          "Photosynthesis is the process by which green plants use sunlight, water and carbon dioxide to make sugar. "
          "It releases oxygen into the air.",
          "Photosynthesis is how plants make their own food. They use sunlight, water and air to make sugar, and they "
          "give us oxygen to breathe."),
    Topic("digestion", "how digestion works",
          "Digestion is the process by which the body breaks food down into small nutrients. These pass through the "
          "wall of the intestine into the blood.",
          "Digestion is what your body does with your lunch. Your tummy mashes the food into tiny bits, and your body "
          "uses them to grow and play."),
    Topic("evaporation", "the process of evaporation",
          "Evaporation is the change of a liquid into a gas at its surface. Wet clothes dry because water molecules "
          "escape from them into the air.",
          "Evaporation is how a puddle disappears. The water turns into an invisible gas and floats off into the air, "
          "faster on a warm day."),
    Topic("the water cycle", "how the water cycle works",
          "The water cycle is the movement of water between the sea, the air and the land. Water evaporates, forms "
          "clouds, falls as rain or snow and flows back.",
          "The water cycle is the long trip that water takes. It rises from the sea, makes clouds, falls as rain and "
          "runs back to the sea."),
    Topic("a rainbow", "how a rainbow forms",
          "A rainbow forms when sunlight is bent and reflected inside raindrops. Each colour bends by a slightly "
          "different amount, so the white light spreads into a band of colours.",
          "A rainbow appears when the sun shines on raindrops. The little drops split the sunlight into colours, from "
          "red all the way to violet."),
    Topic("gravity", "how gravity works",
          "Gravity is the force that pulls objects with mass towards each other. It keeps our feet on the ground and "
          "holds the planets in orbit around the Sun.",
          "Gravity is a pull that you cannot see. When you jump up, gravity brings you back down, because the big "
          "Earth pulls on everything."),
    Topic("a magnet", "how a magnet works",
          "A magnet is an object that produces a magnetic field and attracts materials such as iron. When two magnets "
          "meet, unlike poles attract and like poles repel.",
          "A magnet can pull on some metals, such as iron, without touching them. Two magnets can also pull together "
          "or push each other away."),
    Topic("a volcano", "how a volcano erupts",
          "A volcano is an opening in the Earth's crust through which molten rock, ash and gas escape. Pressure from "
          "gas in the magma often drives the eruption.",
          "A volcano is like a mountain with a chimney. Deep down, the rock is so hot that it melts, and sometimes it "
          "bursts out at the top."),
    Topic("an earthquake", "what causes an earthquake",
          "An earthquake is a shaking of the ground, usually caused when rocks slip suddenly along a fault. The "
          "stored energy travels outwards as seismic waves.",
          "An earthquake is when the ground shakes. Huge pieces of rock deep under our feet get stuck, then slip "
          "suddenly, and everything wobbles."),
    Topic("the seasons", "why the seasons change",
          "The seasons change because the Earth's axis is tilted as it travels around the Sun. Each hemisphere has "
          "summer when it leans towards the Sun.",
          "The seasons change because our Earth is tilted. When our part leans towards the Sun we have summer, and "
          "when it leans away we have winter."),
    Topic("day and night", "why we have day and night",
          "Day and night occur because the Earth rotates on its axis about once every twenty-four hours. The side "
          "facing the Sun is lit while the other side is dark.",
          "Day and night happen because the Earth spins like a top. It is day when we face the Sun, and night when we "
          "turn away from it."),
    Topic("the tides", "what causes the tides",
          "The tides are the regular rise and fall of the sea. They are caused mainly by the pull of the Moon's "
          "gravity, with a smaller effect from the Sun.",
          "The tides make the sea rise and fall on the beach each day. The Moon pulls on the water, and the Sun helps "
          "a little."),
    Topic("rust", "how rust forms",
          "Rust is a reddish-brown substance that forms when iron or steel reacts with oxygen and water. Paint or oil "
          "protects the metal by keeping both away.",
          "Rust is the flaky brown stuff on old iron. It grows when the metal gets wet and meets the air, so keep "
          "your bike dry."),
    Topic("germination", "the process of germination",
          "Germination is the process by which a seed begins to grow into a new plant. It needs water, oxygen and a "
          "suitable temperature.",
          "Germination is when a seed wakes up and starts to grow. It drinks water, pushes a root down and sends a "
          "tiny shoot up."),
    Topic("pollination", "how pollination works",
          "Pollination is the transfer of pollen from the male part of a flower to the female part. Wind and insects "
          "often carry it, allowing seeds to form.",
          "Pollination is how flowers get ready to make seeds. Bees visit for a sweet drink and carry yellow dust, "
          "called pollen, from flower to flower."),
    Topic("the heartbeat", "how the heartbeat works",
          "The heartbeat is the regular contraction of the heart muscle, set off by small electrical signals. Each "
          "beat pumps blood to the lungs and the rest of the body.",
          "The heartbeat is the thump you feel in your chest. Your heart squeezes again and again to push blood all "
          "around your body."),
    Topic("breathing", "how breathing works",
          "Breathing moves air into and out of the lungs. The diaphragm and rib muscles draw air in, so that oxygen "
          "enters the blood and carbon dioxide leaves it.",
          "Breathing brings fresh air into your body. Your chest grows bigger to pull air in, and then it gets "
          "smaller to let old air out."),
    Topic("an echo", "how an echo is made",
          "An echo is a sound heard again after it reflects from a hard surface such as a cliff. The delay is the "
          "time the sound takes to travel there and back.",
          "An echo is your voice bouncing back to you. Shout at a big wall or a cliff, and the sound comes back like "
          "a ball."),
    Topic("a battery", "how a battery works",
          "A battery stores chemical energy and changes it into electrical energy. Chemical reactions inside it push "
          "electrons through a circuit from one terminal to the other.",
          "A battery is a little box of stored energy. When you switch on your torch, the battery sends electricity "
          "to make the light shine."),
    Topic("a telescope", "how a telescope works",
          "A telescope uses lenses or mirrors to gather light from distant objects and form a magnified image. A "
          "wider lens or mirror reveals fainter objects.",
          "A telescope makes faraway things look bigger and brighter. Its lenses or mirrors collect lots of light, so "
          "you can see the Moon up close."),
    Topic("a refrigerator", "how a refrigerator works",
          "A refrigerator moves heat from its inside to the room. A fluid evaporates in pipes and absorbs heat "
          "inside, then is compressed and condenses, releasing that heat outside.",
          "A refrigerator keeps your milk cold. It carries the warmth away from the food inside and lets it out into "
          "the kitchen."),
    Topic("a bicycle", "how a bicycle moves",
          "A bicycle turns the push of the rider's legs into motion. The pedals turn a chain wheel, and the chain "
          "drives the rear wheel.",
          "A bicycle moves when you push the pedals. The pedals pull the chain, the chain turns the back wheel, and "
          "off you roll."),
    Topic("a sailboat", "how a sailboat moves",
          "A sailboat uses the force of the wind on its sails to move. Its keel resists sideways drift, which allows "
          "the boat to sail at an angle into the wind.",
          "A sailboat is a boat that the wind moves. The wind presses on the big sail, and the boat glides over the "
          "water."),
    Topic("an aeroplane wing", "how an aeroplane wing works",
          "An aeroplane wing produces lift by turning the oncoming air downwards. The air pushes back on the wing, "
          "with higher pressure below it than above.",
          "An aeroplane wing pushes air down as the plane rushes forward. The air pushes back up on the wing, and "
          "that keeps the plane flying."),
    Topic("vaccination", "how vaccination works",
          "Vaccination trains the immune system by showing it a harmless form or part of a germ. The body can then "
          "respond quickly if it meets the real germ.",
          "Vaccination teaches your body how to fight a germ. It shows your body what the germ looks like, so it is "
          "ready if the real one comes."),
    Topic("yeast", "how yeast makes bread rise",
          "Yeast is a tiny fungus that feeds on sugars in dough and releases carbon dioxide. The gas forms bubbles "
          "that make the bread rise.",
          "Yeast is a tiny living thing that bakers put in dough. It eats sugar and makes bubbles of gas, and the "
          "bubbles puff up the bread."),
    Topic("recycling", "how recycling works",
          "Recycling is the collection and processing of used materials to make new products. It saves raw materials "
          "and reduces the amount of waste sent to landfill.",
          "Recycling turns old things into new things. Used glass can be melted to make a new jar, and old paper can "
          "become new paper."),
    Topic("a thermometer", "how a thermometer works",
          "A thermometer is an instrument that measures temperature. In the common glass type, a liquid expands as it "
          "warms and rises up a narrow tube beside a scale.",
          "A thermometer tells you how hot or cold something is. In a glass one, the coloured liquid climbs up the "
          "tube when it gets warm."),
    Topic("a compass", "how a compass works",
          "A compass has a magnetised needle that turns freely and lines up with the Earth's magnetic field. One end "
          "points towards magnetic north.",
          "A compass helps you find your way. Its needle is a tiny magnet, and it turns to point north because the "
          "Earth is like a giant magnet."),
    Topic("a solar panel", "how a solar panel works",
          "A solar panel changes sunlight directly into electricity. Light striking its silicon cells frees "
          "electrons, which flow as an electric current.",
          "A solar panel turns sunshine into electricity. When the sun shines on it, it makes power for lamps, toys "
          "and whole houses."),
    Topic("a wind turbine", "how a wind turbine works",
          "A wind turbine changes the energy of moving air into electricity. The wind turns its blades, and the "
          "spinning shaft drives a generator.",
          "A wind turbine looks like a giant pinwheel. The wind spins its long blades, and the spinning makes "
          "electricity for our homes."),
    Topic("a lever", "how a lever works",
          "A lever is a rigid bar that turns about a fixed point called the fulcrum. A small force far from the "
          "fulcrum can lift a heavy load close to it.",
          "A lever is a strong bar that helps you lift things. A seesaw is a lever, and when one end goes down, the "
          "other end goes up."),
    Topic("a pulley", "how a pulley works",
          "A pulley is a grooved wheel that guides a rope and changes the direction of a pull. Several pulleys used "
          "together reduce the force needed to lift a load.",
          "A pulley is a wheel with a rope over it. You pull the rope down, and the load on the other end goes up, "
          "like a flag on a pole."),
    Topic("friction", "how friction works",
          "Friction is the force that resists the sliding of one surface over another. It lets shoes and tyres grip "
          "the ground, but it also causes wear and heat.",
          "Friction is a force that slows things when they rub together. It stops your shoes from slipping, and it "
          "warms your hands when you rub them."),
    Topic("static electricity", "what causes static electricity",
          "Static electricity is a build-up of electric charge on a surface, often caused when two materials touch "
          "and separate. The charge may escape as a small spark.",
          "Static electricity can make your hair stand up. When you rub a balloon on your hair, tiny charges move, "
          "and your hair sticks to the balloon."),
    Topic("lightning", "how lightning happens",
          "Lightning is a giant electric spark produced by charges that separate inside a storm cloud. It heats the "
          "air so quickly that the air expands and makes thunder.",
          "Lightning is a huge spark in a stormy sky. It heats the air so fast that the air goes boom, and we call "
          "that sound thunder."),
    Topic("a hot air balloon", "how a hot air balloon flies",
          "A hot air balloon rises because heated air is less dense than the cooler air around it. A burner keeps the "
          "air inside hot.",
          "A hot air balloon floats because warm air is lighter than cold air. A flame heats the air inside, and up "
          "goes the basket."),
    Topic("a submarine", "how a submarine dives",
          "A submarine dives by letting sea water into its ballast tanks, which makes it heavier. It rises when "
          "compressed air forces the water out again.",
          "A submarine is a boat that can go under the sea. It fills its tanks with water to sink, and it pushes the "
          "water out to rise."),
    Topic("soap", "how soap cleans",
          "Soap has molecules with one end that attracts water and another that attracts grease. They surround the "
          "grease so that water can carry it away.",
          "Soap helps water wash away greasy dirt. One end of each soap bit grabs grease and the other end grabs the "
          "water, so the dirt rinses off."),
    Topic("a glacier", "how a glacier forms",
          "A glacier is a large mass of ice formed from snow that is pressed together over many years. It flows "
          "slowly downhill under its own weight.",
          "A glacier is a giant river of ice. Snow piles up year after year, squashes into ice and then slides down "
          "the mountain very slowly."),
    Topic("a fossil", "how a fossil forms",
          "A fossil is the preserved remains or trace of an ancient living thing. Many form when bones or shells are "
          "buried in sediment and minerals slowly replace them.",
          "A fossil comes from something that lived long, long ago. Mud covered its bones or shell, and over a very "
          "long time they turned to stone."),
    Topic("camouflage", "how camouflage works",
          "Camouflage is colouring or shape that helps an animal blend into its surroundings. It hides prey from "
          "predators and helps hunters approach unseen.",
          "Camouflage is how animals hide in plain sight. A brown moth on brown bark is hard to spot, so hungry birds "
          "may fly right past."),
    Topic("hibernation", "how hibernation works",
          "Hibernation is a state in which some animals survive winter by lowering their body temperature, heartbeat "
          "and breathing rate. They live mainly on stored fat.",
          "Hibernation is a long winter rest for some animals, such as hedgehogs. They eat a lot in autumn, then curl "
          "up until spring comes."),
    Topic("metamorphosis", "the metamorphosis of a butterfly",
          "Metamorphosis is the change of body form that some animals go through as they become adults. A caterpillar "
          "turns into a pupa and then emerges as a butterfly.",
          "Metamorphosis is a big change in an animal's body. A caterpillar makes a hard case called a chrysalis, and "
          "inside it becomes a butterfly."),
]
# fmt: on
