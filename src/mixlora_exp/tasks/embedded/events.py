"""What happens to people, how they feel about it, and what they do next. The person is left out."""

from __future__ import annotations

from mixlora_exp.tasks.embedded.tables import Fact, headed, lines, pairs

__all__ = ["FEELINGS", "MOTIVES", "NAMES", "NEXT_STEPS"]

NAMES = tuple(
    name
    for line in lines("""
Alice Amir Anna Anton Bella Ben Bruno Carla Carlos Cathy Clara Dan Daria David Diego Dora Eddie
Elena Ella Emil Emma Eric Eva Felix Fiona Frank Gina Greg Hana Harry Helen Henry Hugo Ida Igor Ines
Iris Ivan Jack Jane Joan John Julia Karim Karl Kate Kevin Lara Laura Leo Lily Linda Lisa Louis Lucas
Lucy Maria Mark Martin Mary Max Mia Nadia Nick Nina Noah Nora Olga Oliver Omar Oscar Paul Peter Rita
Robert Rosa Ruth Sam Sara Simon Sofia Steve Susan Tara Theo Tina Tom Vera Victor Wendy
""")
    for name in line.split()
)

FEELINGS = headed(
    "feeling",
    """
proud |
    won first prize at the fair; got the best grade in class; finished a hard marathon
    built a treehouse alone; was praised by the coach in front of the team
    learned to play a difficult song; was chosen as captain
sad |
    said goodbye to a dying pet; lost a favorite necklace forever
    heard that a dear friend is moving away; watched the old family house being torn down
    missed the last chance to see grandmother; found the pet rabbit dead
afraid |
    heard footsteps in the dark cellar; met a growling bear in the woods
    looked down from a shaky bridge; saw a shark near the boat
    was caught in a terrible storm at sea; found a snake in the bed
tired |
    worked two shifts in a row; walked thirty miles in a day; stayed up all night with the baby
    carried furniture from morning to evening; did not sleep for two days
    dug in the garden for ten hours
hungry |
    had no breakfast and no lunch; forgot the lunch box at home
    smelled fresh pizza after a long fast; had eaten nothing since yesterday
    skipped dinner to catch a train; hiked all day without any food
bored |
    waited four hours with nothing to do; watched paint dry; sat through a dull speech
    had to read the phone book aloud; stared at an empty wall all day
    listened to the same lecture for the third time
embarrassed |
    tripped on stage in front of everyone; called the teacher mom by mistake
    wore two different shoes to the party; forgot the words during the school play
    spilled soup on the boss at a dinner; snored loudly in the quiet library
grateful |
    got help from a stranger with a flat tire; was given a warm coat by a neighbor
    got a lost wallet back; was saved by a lifeguard; received a kidney from a friend
    was visited every day by a friend in the hospital
cold |
    stood in the snow without a coat; fell into an icy lake; slept in a tent in winter
    lost both gloves on a frosty morning; waited for the bus in freezing wind
    swam in the sea in January
angry |
    was cheated by a salesman; found the new car scratched on purpose
    was insulted by a rude neighbor; saw a bully hit a small child
    was blamed for what someone else did; caught a thief with the stolen bike
thirsty |
    crossed the desert with an empty bottle; ate a whole bag of salty chips
    played soccer in the heat without a drink; woke up with a very dry mouth
    ran a long race with no water
""",
)

NEXT_STEPS = tuple(
    Fact("next", left, left, right)
    for left, right in pairs("""
dropped a glass on the floor = sweep up the pieces; got a splinter in the finger = pull it out
noticed that the fridge was empty = go to the grocery store; got a letter from a friend = read it
heard the doorbell ring = open the door; felt very sleepy in the evening = go to bed
saw smoke coming from a house = call the fire department; got soaked in the rain = change clothes
lost the house key = call a locksmith; found a hole in a sock = mend it
had a toothache = see a dentist
finished eating dinner = wash the dishes; saw that the dog wanted to go out = fetch the leash
bought a new book = start reading it; planted some seeds = water them; broke an arm = go to a doctor
took the cake out of the oven = let it cool; arrived at the hotel = check in at the desk
ran out of gas on the road = walk to a gas station; got a flat bicycle tire = pump it up
wanted to mail a parcel = go to the post office; caught a big fish = take it off the hook
saw the traffic light turn red = stop the car; saw a friend across the street = wave and say hello
heard the phone ring = pick it up; got mud on the carpet = clean the carpet
got a haircut = pay the barber
found a stray kitten = look for its owner; felt cold in the room = turn up the heater
heard the alarm clock in the morning = get out of bed; took a photo of the view = show it to friends
saw the bus coming = get on board; got a new puzzle = put the pieces together
spilled ink on the desk = wipe it up; picked a basket of apples = bake an apple pie
bought tickets for the concert = go and hear the band; learned that a test is tomorrow = study hard
saw the baby crying in the crib = pick the baby up; was given a wrapped present = unwrap it
""")
)

MOTIVES = tuple(
    Fact("motive", left, left, right)
    for left, right in pairs("""
put on a raincoat = to stay dry; opened the window on a hot day = to let in fresh air
saved money for a year = to pay for a trip; whispered in the library = to avoid disturbing readers
set an alarm for five = to get up early; put sunscreen on = to avoid a sunburn
wore a helmet on the bike = to protect the head; locked the front door = to keep burglars out
took a pill for a headache = to stop the pain; lit a candle during the blackout = to see in the dark
bought flowers for mother = to please a parent; practiced the piano daily = to play better
put food in a bowl on the floor = to feed the cat; turned off the lights = to save electricity
climbed to the mountain top = to enjoy the view; put milk in the fridge = to keep it from going sour
joined a gym = to get fit; wrote the date in a diary = to remember an appointment
brought an umbrella to work = to be ready for rain
stirred sugar into the coffee = to make it sweeter
asked a policeman for directions = to find the way
tied the boat to the dock = to stop it drifting away
put a bandage on the knee = to cover a cut; packed a swimsuit = to swim at the beach
painted the rusty fence = to make it look new; called the restaurant = to book a table
""")
)
