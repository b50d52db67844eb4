# SPDX-License-Identifier: Apache-2.0
"""A grammar of short simple stories: unlimited training and evaluation text from a seed.

A story is an opening, a plot and an ending. Each is a list of beats, each beat a list of variants,
of which one is taken. A variant is a sentence or several, in a small notation:

    {one|two|}    one of the alternatives, which may be empty or hold further ones
    $name         a slot: the same value wherever it occurs in a story (hero, place, thing ...), or
                  a rule of `RULES`, drawn anew each time; `$Name` starts it with a capital

Everything is drawn with `random.Random.random`, whose sequence Python promises to keep, so a seed
gives the same story everywhere. Odd seeds are the held-out split: training never sees them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from random import Random


def _words(text: str) -> list[str]:
    return text.split()


_GIRLS = _words("Lily Mia Anna Sue Emma Rose Nora Zoe Amy Ruby Kate Molly")
_BOYS = _words("Tom Ben Max Sam Tim Jack Leo Finn Dan Bob Gus Nick")
_PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
_ANIMALS = _words(
    "rabbit fox bear cat dog mouse duck frog bird squirrel hedgehog owl turtle pony sheep pig goat"
)
_ELDERS = {
    "girl": _words("mom grandma aunt sister mother"),
    "boy": _words("dad grandpa uncle brother father"),
}
_PLACES = {
    "in": _words("park forest garden meadow village market barn field woods town"),
    "at": _words("beach farm lake school zoo playground"),
    "by": _words("river pond sea stream bridge mill"),
    "on": _words("hill mountain island"),
}
_PREPOSITIONS = ("in", "in", "in", "at", "at", "by", "on")
_COLORS = _words("red blue green yellow pink white brown golden purple orange")
_LOOKS = _words("big small new old soft shiny pretty little")
_THINGS = _words(
    "ball kite hat boat doll book drum box cup scarf bell key balloon lamp blanket car train bag"
    " ring basket"
)
_FOODS = _words(
    "bread cake soup cookies berries honey pancakes cheese apples nuts corn pie pears plums"
)
_CROPS = _words("berries apples nuts corn pears plums flowers beans carrots")

RULES = {
    "trait": (
        "{little|little|small|kind|brave|shy|happy|clever|quiet|curious|funny|good|young|lazy"
        "|gentle}"
    ),
    "nice": "{nice|warm|sunny|bright|cold|windy|cloudy|lovely|quiet}",
    "time": "{day|morning|afternoon}",
    "oneday": "{One $time|One $nice $time|One day|The next $time|One time|On a $nice $time}",
    "later": "{Then|Soon|After that|A little later|After a while|Just then|In the end|At last}",
    "home": "{house|small house|little hut|cottage|big house|warm home|tall tree house}",
    "glad": "{happy|very happy|so happy|glad|very glad|proud|so proud|full of joy}",
    "sad": "{sad|very sad|so sad|upset|lonely|worried|a little sad|very upset}",
    "said": "{said|said|said|called|whispered|answered}",
    "cried": "{cried|said|shouted|called}",
    "went": "{went|walked|ran|hurried|set off}",
    "saw": "{saw|found|met|noticed|came upon}",
    "inside": (
        "{under the bed|behind the door|on the chair|under the table|in the kitchen|in a box"
        "|on a shelf|behind the curtain}"
    ),
    "spot": (
        "{behind the tree|in the tall grass|under a bush|near the gate|by the wall|on the roof"
        "|behind a rock|under a tree|in the sand|by the old road|in a hole}"
    ),
    "hobby": (
        "{play|sing|dance|read|run and jump|swim|paint|climb trees|look at the stars|count the"
        " birds|draw pictures|tell stories|make music|pick flowers|bake $food|play with $his $noun}"
    ),
    "game": "{hide and seek|catch|a game|tag|in the sand|in the leaves|with the $noun|in the sun}",
    "weather": (
        "{The sun was {shining|hot|bright|warm}.|The sky was {blue|gray|clear}.|The wind was"
        " {soft|strong|cold}.|The birds were singing.|It was {quiet|warm|cold|a bit dark}.|The"
        " flowers {were in bloom|smelled sweet}.|White clouds {were in the sky|went by}.}"
    ),
    "worked": ("{worked|worked hard|worked and worked|worked all {day|morning}|did $his best}"),
    "thanks": '"Thank you{| so much| for {your|all the} help}{!|,}"',
    "wow": "{Oh|Wow|Look|Hooray|Yes}",
}

_OPENINGS = """
Once upon a time, there was a $trait $kind named $hero.
Once upon a time, there was a $trait $kind named $hero.
Once upon a time, there was a $trait $kind. {$His name was $hero|$His name was $hero}.
Once upon a time, a $trait $kind named $hero lived {in a $home|$at|near the $place}.
Once upon a time, {in a $home near the $place|$at|far away $at}, there lived a $kind named $hero.
Once there was a $trait $kind named $hero who {loved|liked|wanted} to $hobby.
There once was a $trait $kind called $hero.
$hero was a $trait $kind who lived in a $home {near|by|not far from} the $place.
Long ago, a $trait $kind named $hero lived with $his $elder in a $home.
A $trait $kind named $hero lived {with $his $elder|in a $home|all alone} {$at|near the $place}.
In a $home near the $place lived $hero, a {very |}$trait $kind.

$he {loved|liked} to $hobby {and to $hobby|$at|with $his $elder|all day long|every day}.
$he had a $thing. {It was $his {favorite|best} thing.|$He took it everywhere.|It was a gift.}
{Every $time|Each day}, $he {went|walked|ran} to the $place {to $hobby|with $his $elder}.
$he lived with $his $elder, {who was very {kind|old|wise}|who told good stories}.
$he was {very|so|always} {kind|funny|busy|hungry|quiet}, and everyone {liked|loved|knew} $him.
{People said that $he was|Everyone knew that $he was|$He was} the
    {kindest|nicest|funniest|bravest|happiest} $kind $at.
$he had {big|bright|kind} {blue|green|brown} eyes and {a warm smile|a kind heart}.
$he {did not have many friends|had no brothers or sisters}, so $he was {often|sometimes} $sad.
$he {always|often} wore a $color {hat|scarf|coat} {that $his $elder had made|, even in summer}.
"""

_COMPANIONS = """
$his best friend was a $trait $fkind named $friend.
$his best friend was $friend, a $trait $fkind. They {did everything together|loved to $hobby}.
$he had a friend{|, a $trait $fkind} named $friend. {They played together every $time.|}
$friend the $fkind lived {next door|$at2|near the $place2} and {often came by|was $his friend}.
{Sometimes|Every $time}, $he played $game with $friend, a $fkind
    {from the $place2|who lived $at2}.
"""

_LOST = """
$oneday, $hero could not find $his $thing.
$oneday, $hero {went|ran} to the $place to play with $his $thing, but soon it was gone.
$oneday, $hero looked for $his $thing, but it was not there.
$oneday, $hero {came home|came back} from the $place and saw that $his $noun was gone.

"Where is my $noun?" $he {cried|asked|said}. {$He felt $sad.|$He began to cry.|$He was $sad.}
$he {looked|searched} $inside, $inside and $inside, but {it was not there|$he found nothing}.
$he {began|started} to cry. "I {have lost|lost|cannot find} my $noun," $he said.
$he {was $sad|felt $sad}. {$He looked everywhere|$He did not know what to do|$He sat down $spot}.

$his $elder {heard $him|came to help}. "{Do not cry|Do not worry}," $ehe said. "We will find it."
$he {asked|went to} $his $elder. "Have you seen my $noun?" "No," $ehe $said.
$hero {asked|told} $friend the $fkind {for help|about it}. "{I will help you|Let us look}," $fhe
    said.
"Have you seen my $noun?" $hero asked $friend. "No, but I {can|will} help you," $said $friend.
A $fkind named $friend came by. "Why are you {so sad|crying}?" $fhe asked. "I lost my $noun."

They {looked|searched} $spot and $spot. {It took a long time.|They did not give up.|}
{Together they|They} $went to the $place2 and looked {everywhere|$spot|for a long time}.
{First|Together} they looked $spot. {Then|After that} they looked $spot. {There was nothing
    there.|}
They asked the {old|wise} $fkind2 $at2. "I saw {it|something $color} $spot," $said the $fkind2.

$later, $hero {looked|saw something} $spot. There {was|lay} the $thing!
$later, they {saw something $color|heard a sound} $spot. It was the {$noun|$thing}!
"$wow! {Here it is|There it is|I found it}!" $cried $friend. The $noun was $spot.
A little bird had {taken|found} the $noun and {kept|put} it in {a|its} nest. {It gave it back.|}
{The wind had blown|A {dog|goat|bird} had taken} the $noun {away|to the $place2}, and there it
    was.

$hero {hugged|held} $his $noun {and laughed|and smiled|very tight}. $thanks $he $said.
$hero was $glad. $thanks $he {said|cried}. {$He {danced|laughed} for joy.|}
"I will {take good care of it|never lose it again}," $said $hero. {$He smiled.|$He was $glad.}
{From then on|After that}, $hero always {put|kept} $his $noun {in a safe place|$inside}.
"""

_FRIEND = """
$oneday, $hero {went|walked} to the $place. $weather {$He was all alone.|}
$oneday, $hero {sat|was sitting} $at{| with $his $noun}. $weather
$oneday, $hero wanted to {play|play $game}, but {nobody was there|there was no one to play with}.

There $he $saw a $trait $fkind. "{Hello|Hi|Good morning}, my name is $friend," said the $fkind.
$later, a $fkind came by. "Who are you?" asked $hero. "I am $friend," $fhe $said.
$he $saw a $fkind $spot. The $fkind was {crying|alone|very shy|hungry}. {$Fhis name was $friend.|}
A $trait $fkind named $friend was {hiding|sitting|sleeping} $spot.

"{Do you want|Would you like} to play {with me|$game}?" asked $hero. "{Yes|Oh yes}!" said $friend.
"{Can|May} I play with you?" asked $friend. "{Yes|Of course}," said $hero{ and smiled|}.
$hero {was shy|was afraid} at first, but {then|soon} $he said, "{Let us play|You can be my
    friend}."
"Why are you {sad|alone}?" asked $hero. "{I have no friends|I do not know anyone}," $said $friend.
"{I am hungry|I am cold|I have lost my way}," said $friend. "I {can|will} help you," said $hero.

They played $game {and|, and then they played} $game {all {day|afternoon}|until the sun went
    down}.
$hero {shared|gave $friend some of} $his $food{|, and $friend ate {it all|with joy}}.
$hero showed $friend $his $thing, and $friend showed $hero {a $thing2|how to $hobby|the $place2}.
First they {ran|went} to the $place2. {Then|After that} they played $game. {It was so much fun.|}
$friend {knew|told} {a funny|a good|an old} {story|song|joke}, and $hero laughed {and laughed|out
    loud}.

But then {it began to rain|the wind took the $noun|it got dark}. "{Oh no|Come with me}!" $cried
    $friend.
But $friend wanted {the $noun|to go home}, and $hero did not want {to share|to stop}. They {were
    $sad|had a fight}.
{At noon|After a while} they were {hungry|tired}, so they {sat $spot and ate $food|had some
    $food}.
Then $hero {fell|hurt $his foot}. $friend {helped $him up|ran to get $his $elder}. {"Thank you,"
    said $hero.|}

They {ran|went} {home|to a $home} {together|hand in hand} and {ate $food|drank warm milk}.
"{I am sorry|Let us not fight}," said {$hero|$friend}. {They hugged.|Then they played again.|They
    smiled.}
When {it was late|the sun went down}, {$friend had to go home|they said good night}. "{See
    you|Come back} tomorrow!"
"You are my best friend," $said {$hero|$friend}. {They were $glad.|They hugged.|}

From that day on, $hero and $friend {were best friends|played together every day|were never
    alone}.
After that, they met $at every {day|$time} {to $hobby|and played $game}.
$hero {went home|told $his $elder about it}. $He was {glad|happy} to have a {new |}friend.
"""

_FEAR = """
$hero {was afraid of|did not like} $fear. {$He did not tell anyone.|Everyone laughed at $him.|}
There was one thing that $hero {did not like|was afraid of}: $fear.
$hero was {a bit|very} brave, but $he was {afraid|so afraid} of $fear.

$oneday, $his $elder {asked|wanted} $him to {go|come} to the $place. {But $hero said no.|$He was
    afraid.}
$oneday, $friend the $fkind {came by|called}. "{Come with me|Let us go} to the $place!" $fhe said.
$oneday, $hero $went to the $place {with $friend|with $his $elder}. $weather
One night, $hero {could not sleep|heard a {strange|loud} sound}. {It was very dark.|$He hid in
    $his bed.}

"I {cannot|do not want to} go," said $hero. "I am {afraid|scared} {of $fear|}."
$hero {hid|sat} $spot {and did not move|and began to cry}. $his {heart beat fast|legs shook}.
"{What is wrong|Why are you afraid}?" asked $his $elder. $hero {told $ehim.|said, "I am afraid of
    $fear."}
$hero wanted to {run|hide} {away|at home}, but {$he did not|$his legs did not move}.

"{Do not be afraid|Do not worry}," said $his $elder. "I {am|will stay} {here|with you}."
$his $elder {took|held} $his hand. "{Everyone is afraid sometimes|You can do it}," $ehe said.
"{I was|Once I was} afraid too," $said $his $elder. "{Take a deep breath|Let us try together|Hold
    my hand}."
$friend {smiled|took $his hand}. "I {was|am} {also |}afraid{| sometimes}," $fhe $said. "{Come|Let
    us try}!"

{Then $hero|So $hero} took a deep breath and {took one step|closed $his eyes|counted to
    {three|ten}}.
$hero {tried|took one small step}. {Then $he took one more.|It was not so bad.|$He did not look
    back.}
$later they heard {a cry|a small voice}: "Help! {I am stuck|Please help me}!" It was a $fkind2
    $spot.
$he {held|took} $his $noun and {went on|sang a song}. {It was hard, but $he did not stop.|}

$hero {forgot|did not think of} $his fear and {ran to help|helped the little one}. {"Thank
    you!"|} {All was well.|}
$later, $he {laughed|smiled}. "{It is not so bad|I did it|I am not afraid}!" $he $cried.
{Step by step|Little by little}, {it got easier|$hero felt better}. "{I can do it|Look at me}!"
    $he $cried.

$his $elder {hugged|kissed} $him. "{You are so brave|I am proud of you|Well done}," $ehe said.
{Now|From that day on}, $hero was {not|no longer} {afraid of $fear|scared}. {$He was $glad.|}
{That night|That evening}, $hero {slept well|told $friend all about it}. {$He felt $glad.|}
"""

_GIFT = """
It was {soon|almost} the birthday of $his $elder, and $hero wanted to {make|give $ehim} {a
    gift|something}.
$oneday, $hero saw that $his $elder was {$sad|tired|sick}. $he wanted to help.
$oneday, $hero {heard|learned} that it was the birthday of $his $elder. "I need a gift," $he
    {said|thought}.

"What can I {give|make}?" $he {thought|said}. "I do not have any money."
$he {looked $inside|thought for a long time}. {Then $he had an idea.|"I know!" $he said.}
"I {will|can} {make|bake} {a $thing2|some $food|a big cake}," {$he said|thought $hero}.
$he {wanted|tried} to {buy|find} a $thing2, but {it cost too much|there was none}.

$he {went|ran} to the $place to {find|look for} {flowers|berries|wood|some {paper|paint}}.
    $weather
$friend the $fkind {came to help|saw $him}. "{What are you doing|Can I help}?" $fhe asked. {"Yes,
    please."|}
First $he {got|took} {some paper|flour and milk|some wood|a $color cloth}. Then $he $worked.
$hero and $friend $worked. They {mixed|cut|painted} and {sang|laughed}.

But {then the|the} {cake fell|milk ran out|paint was gone|rain came}. $hero was $sad.
But it was {hard|not easy}. {The first one broke.|$He made a big mess.|It did not look good.}
$hero {hurt|cut} $his hand {a little|}, but $he did not {stop|give up}. {"I can do it," $he
    said.|}
{It took all {day|morning}|It took a long time}. {The sun went down.|$hero was very tired.|}

"{Try again|Do not give up}," $said $friend. {So $he did.|"I will help you."|And so $he tried
    again.}
$he tried again, {and this time it was good|and $friend helped $him}. {It was $color and
    {pretty|big}.|}
$later it was {done|ready}. It was {the best gift|{a bit small|not perfect}, but {very |}pretty}.
$hero {put|wrapped} it in a $color {box|bag|cloth} and {ran home|tied it with a ribbon}.

"$wow! {Happy birthday|This is for you}!" {said|called} $hero. {$His heart beat fast.|}
$he gave it to $his $elder. "{Is this for me|Did you make this}?" $ehe asked.
{In the evening|The next morning}, $hero {gave|brought} $ehim the gift. {$Ehis eyes were bright.|}

"{It is {lovely|perfect|so pretty}|I love it|This is the best gift}," said $his $elder {and
    {smiled|hugged $him}|}.
$his $elder was $glad. {They {ate|had} $food together.|$Ehe hugged $him.|$Ehe had a tear in $ehis
    eye.}
They {had a party|sat together} and ate {$food|$food and $food2}. {Everyone was $glad.|They sang
    a song.|}
"""

_TRIP = """
$oneday, $hero and $his $elder {planned|wanted} to go {on a picnic|to the $place}.
$oneday, $hero asked $his $elder, "{Can we go|Shall we go} to the $place?" "{Yes|Of
    course}," $ehe $said.
$oneday, $hero and $friend {set off|went} to {see|find} the {big|old} $place2.

They {packed|took} {some $food|$food and $food2}, {a blanket|a $thing2} and {a map|some
    water|$his $noun}.
They {walked|went} {for a long time|past the $place2|over the hill}. $weather
{On the way|Soon} they $saw {a $fkind2|a {big|small} $fkind2} $spot. {"Hello!" it said.|It ran
    away.|It looked hungry.}
They {got up early|put on their {boots|hats}} and {took the bus|walked} to the $place. {They sang
    a song.|}

But then {the sky {got|turned} dark|big clouds came} and it {began|started} to rain. {"Oh no!"
    $cried $hero.|}
But {when they got there|at the bridge}, the {gate|road} was closed. {$hero was $sad.|"What now?"
    asked $hero.}
Then {they lost their way|the {map|bag} fell into the water}. "{Where are we|What shall we do}?"
    asked $hero.
At the $place, $hero {ran|looked} around, and {soon|then} $he could not see {$his $elder|anyone}.

"{Do not worry|It is all right}," $said {$his $elder|$friend}. "I {have an idea|know what to do}."
"{We can|Let us} {wait $spot|make {our own|a} {fun|house}|ask the $fkind2}," {$hero said|$he
    said}.
They {ran|hurried} to {a {big tree|cave|barn}|an old house} and {sat down|waited} there. {It was
    dry and warm.|}
A {kind|wise|old} $fkind2 {came|showed them the way}. "{Follow me|Come in}," it $said.

There they {ate|shared} {$food|the $food} {and told stories|and played $game}. {It was {so much
    fun|warm}.|}
They {jumped in the {puddles|leaves}|made {paper boats|a {small |}fire}} and {laughed|sang} {out
    loud|}.
{Then|After a while} the rain stopped, and a {big |}rainbow {was|came out} in the sky. {"Look!"
    $cried $hero.|}
They {danced|played $game} {in the rain|until {evening|noon}}. {"This is fun!" said $hero.|}

{In the evening|At last}, they {went|came} home{|, tired but happy|, wet and tired}. {It had been
    a good day.|}
"{This was|That was} {the best day|so much fun}," said $hero {and {smiled|yawned}|}. {They
    laughed.|}
$hero {fell asleep|went to bed} {early|with a smile}. {That night, $he had a good dream.|}
"""

_BROKEN = """
$oneday, $hero {was playing|played} {with $his $noun|$game} in the {house|kitchen}.
$oneday, it rained, so $hero {played|wanted to play} in the {house|kitchen} {with $friend|}.
$oneday, $his $elder {went out|was not at home}, and $hero was {bored|all alone in the house}.

"Do not {run|play} in here," {said $his $elder|$his $elder had said}. But $hero {did not
    listen|forgot}.
$he {ran and jumped|threw the $noun up high}. {"Be careful," said $friend.|It was so much fun.|}
$hero {climbed on|jumped over} the {table|chair} to get {the $thing2|some $food}.

Then there was a {loud |}crash. The {cup|lamp|window|clock} {broke|was broken}!
{Crash|Bang}! The {cup|lamp|clock} {fell down|fell from the table} and broke. {It was {very
    |}old.|}

$hero {hid|sat} $inside {and felt bad|and was afraid}. "{What shall I do|What have I done}?" $he
    {thought|said}.
"{Oh no|Oh dear}," {said|thought} $hero. {$His face {got|turned} red.|$He felt $sad.|$He did not
    know what to do.}
$later, $his $elder came {home|back}. "{Who did this|What is wrong}?" $ehe asked.

"It was {the cat|the wind|not me}," $said $hero. But {$he felt bad|$his voice was very low}.
$hero wanted to {run away|tell a lie}, but {it did not feel right|then $he thought of $friend}.
{That night|All day}, $hero {could not sleep|did not want to eat}. {$He felt $sad.|$He thought
    and thought.}
"You {should|must} tell the truth," $said $friend. {"It is not easy, but it is right."|$hero knew
    it.}

{Then|So} $hero {said|went to $his $elder and said}, "I am {so |}sorry. {I did it.|It was me.|I
    broke it.}"
$hero {took $ehis hand and|} told $his $elder the truth. "{It was me|I am sorry}," $he said.
"{I am sorry|Please do not be mad}," $said $hero, and $he {told the truth|began to cry}.

$his $elder {was not mad|smiled|was quiet for a while}. "{Thank you for {telling|saying} the
    truth|I forgive you}," $ehe said.
"{Everyone makes mistakes|It was only a thing}," $said $his $elder {and hugged $him|}.
"I am {glad|proud} that you told {me |}the truth," said $his $elder. {They hugged.|$Ehe kissed
    $him.|}

{Together they|They} {cleaned up|fixed it|made a new one}. {It was {fun|not hard}.|$hero felt
    {much better|$glad}.|}
$hero {helped to clean up|promised to be {more careful|good}}. {And $he was.|$He kept $his word.|}
"""

_TAKEN = """
$oneday, $hero {saw|found} a $thing2 {$spot|that was not $his}. It {was a gift for
    $friend|belonged
    to $friend|was lovely}.
$oneday, $friend {came by with|had|showed $him} a {new|lovely} $noun2. $hero wanted {it|one} too.
$friend had a {new|lovely} $noun2, and $hero {liked|loved} it very much. "{May I have it|Can I
    have
    it}?" "No," $said $friend.

{It was so {pretty|nice}|$he wanted it so much}. {Nobody was there.|$he looked around.} So $he
    {took it|put it in $his bag}.
When {nobody was looking|$friend was asleep}, $hero {took|picked up} the $noun2 and {ran home|ran
    away|hid it $inside}.

The {next|same} day, $friend {was $sad|began to cry}. "{My $noun2 is gone!|Where is my $noun2?}"
    $fhe {cried|said}.
$later, $friend {came to the house|called}. "{Have you seen|Do you have} my $noun2?" $fhe asked.

"No," said $hero. But {$his face {got|turned} red|$he felt bad|$his voice was very low}.
$hero {did not say anything|looked away}. {$His heart beat fast.|$He felt $sad.|$He ran home.}
$hero tried to play with {it|the $noun2}, but it was {not fun|no fun at all}. {$He felt $sad.|}

{That night|All day}, $hero {could not sleep|did not want to eat}. {$He thought and thought.|}
"What is {wrong|the matter}?" asked $his $elder. $hero {began to cry|told $ehim everything}.
"You {should|must} {give it back|tell the truth}," said $his $elder. {"It is {hard|not easy}, but
    it
    is right."|$hero knew it.}

{Then|So} $hero {went|ran} to $friend and {said|told $fhim}, "I am {so |}sorry. {I took it.|Here
    is
    your $noun2.}"
$hero {gave|brought} the $noun2 back. "{I am sorry|I took it}," $he {said|whispered}. {"Are you
    mad?"|}

$friend {was not mad|smiled|was quiet for a while}. "{Thank you for {telling|saying} the truth|I
    forgive you}," $fhe said.
"{It is all right|You are still my friend}," said $friend. "{We can share it|Let us play
    together}."
$friend was {mad|upset} at first, but then $fhe {smiled|hugged $him}. "{Let us share it|Let us
    play},"
    $fhe said.

$hero felt {much better|$glad}. {They played {with the $noun2|$game} all {day|afternoon}.|}
They {both|} {laughed|smiled} and {played|sang} together. {$hero never took anything again.|}
"""

_HELP = """
$oneday, $hero {went|walked} to the $place {to $hobby|with $his $noun}. $weather
$oneday, $hero {was|was playing $game} $at when $he heard {a {small|sad} voice|a cry}.
$oneday, on the way to the $place, $hero {heard|saw} something {strange|new} $spot.

"Help{| me}! {Please help me|I am stuck|I cannot get out}!" $cried {a $fkind2|a {small|little}
    $fkind2}.
It was a $fkind2. {It was stuck {in the mud|in a net|in a hole|up in a tree}.|It had hurt its
    leg.}
There {was|sat} a {small|little|baby} $fkind2 $spot. It {had fallen|could not find its mother|was
    {cold|wet}}.

"{Do not be afraid|Wait}," said $hero. "I {will|can} {help|save} you."
"{Poor thing|Oh dear}," {said|thought} $hero. "{What can I do|How can I help}?"
$hero {wanted to help|ran to it}, but $he was too {small|weak|far away}. {"I need help," $he
    {said|thought}.|}

$he {pulled|pushed} and {pulled|pushed}, but {it did not move|nothing happened}. {"It is too
    hard," $he said.|}
$he {took|used} {a {long |}stick|$his $noun|a rope} and {tried|reached} {to get it out|up high}.
    {It was hard.|}
So $he ran to get {$friend the $fkind|$his $elder}. {"Come {quick|with me}!" $he $cried.|They
    came {fast|at once}.}
$hero gave it {some $food, and it ate {it all|a little}|some water, but it did not move|a
    blanket}.

{Together they|They} {pulled|pushed} with all their {might|strength}. {One, two, three!|It took a
    long time.|}
$friend {had an idea|came to help}. "{Let us work together|I will hold you}," $fhe said. {And so
    they did.|}
{Then|With one big {pull|jump}}, {it was free|the $fkind2 was free}! {Everyone {cheered|was
    $glad}.|}
$later {the $fkind2|it} {was free|could {walk|stand|fly} again}. {It jumped for joy.|"Hooray!"
    $cried $hero.}

"{Thank you|You saved me}," said the $fkind2. "I will {never forget {you|this}|help you {too|one
    day}}."
The $fkind2 gave {$hero|$him} a {$color|shiny} {stone|shell|flower|feather}. {$He kept it {for
    ever|$spot}.|}
{Its mother|Its family} {came|was so happy} and {thanked|hugged} {$hero|them}. {"You are so
    kind," she said.|}

{Some days later|The next day}, $hero {fell into the water|lost $his way}, and the $fkind2 {came
    to help|saved $him}.
{From that day on|After that}, {they were friends|the $fkind2 came to see $him every {day|week}}.
$hero {went home|ran home} and told $his $elder. "{Well done|I am proud of you}," $ehe said.
"""

_RACE = """
There was {going to be |}a {big |}{race|contest|show} $at. Everyone {wanted|was going} to {win|be
    there}.
$oneday, $friend the $fkind said, "I am {faster|better|stronger} than you, $hero!"
$hero wanted to {learn to {swim|fly a kite|ride a bike|dance|sing|read}|win the {big |}race $at}.

{But|At first} $hero was {very |too }{slow|small|weak}. {$friend laughed at $him.|$He fell {again
    and again|down}.|}
"You {cannot|will never} {do it|win}," {said|laughed} $friend. "You are too {slow|small}!" {$hero
    felt $sad.|}
$he tried, but {$he {fell|failed}|it was {too |very }hard}. {"I cannot do it," $he said.|$He
    wanted to give up.}

"{Do not give up|Try again}," said $his $elder. "{Try a little every day|You need time}."
$his $elder {smiled|sat by $him}. "{I will show you how|It takes time to learn}," $ehe said.
{But|Still,} $hero did not give up. "I will {try|practice} {every day|again}," $he said.

So {every {morning|day}|each $time} $hero {went|ran} to the $place {to practice|and tried again}.
    {It rained.|}
{Day after day|Each day} $he $worked. {$He got {better|faster|stronger}.|Little by little, $he
    got better.}
{First|On the first day} $he {fell|did badly}. {On the second|Then} $he {did a little
    better|{almost |}did it}.

{Then the {big |}day came.|The day {came|was here}.} {Everyone was there.|$His $elder was there
    {too|}.|} $weather
$friend {ran|was} {very |so }fast, but then $fhe {stopped to {rest|eat}|fell|lost $fhis way}.
    $hero {went|kept} on.
"{Ready, set, go|One, two, three}!" {called|shouted} the $fkind2. {They all ran.|$hero {did|gave}
    $his best.}
{In the middle|Near the end}, $friend {fell|got hurt}. $hero {stopped and|ran back and} helped
    $fhim {up|}.

$later, $hero {won|did it|came first|came second}! Everyone {cheered|clapped}. {"Hooray!" they
    $cried.|}
They {came in|crossed the line} together, {hand in hand|side by side}, and {everyone|they all}
    {cheered|laughed}.
$hero did not win, but $he {was $glad|had done $his best}. {"It was fun," $he said.|}

"{You were {great|so good}|Well done}," $said $friend. "I am sorry {that I laughed|for what I
    said}." {They hugged.|}
$his $elder {hugged|was proud of} $him. "{I knew you could do it|You did not give up}," $ehe said.
They {gave $him|all got} {a $thing2|some $food|a {big |}prize}. {$He shared it with $friend.|}
"""

_GARDEN = """
$oneday, $hero {found|got} a {small|tiny|strange|$color} seed {$spot|from $his $elder}.
$oneday, $his $elder gave $him {a seed|some seeds}. "{Plant it|Take care of it}," $ehe said.
$hero {had|found} a {small|little} {garden|pot} {$at|near the $home}, but {nothing grew there|it
    was empty}.

"What {is it|will it be}?" asked $hero. "{Wait and see|You will see}," $said $his $elder.
$he {put|planted} {it|the seed} in the {ground|garden|earth} and {gave it water|sang to it}.
"I {will|want to} grow {flowers|$crop|a {big |}tree}," {said|thought} $hero. So $he dug a {small
    |}hole.

{Every {day|morning}|Each day} $he {gave it water|came to look}. {But nothing
    {grew|happened}.|$weather}
$he waited {one day, two days, three days|for a {long time|week}}. {Nothing {came
    up|happened}.|$He was $sad.}
{It did not rain for {days|a week}|The sun was too hot}. {The ground was dry.|$hero was worried.|}

"It {does not|will never} grow," $said $hero. "{Wait|It needs time}," said $his
    $elder.
$friend {laughed|came by}. "{There is nothing there|What are you doing}?" $fhe {said|asked}. {"I
    am waiting," said $hero.|}
But $hero did not {give up|stop}. {$He $worked.|$He sat {there|by it} every day.|}

Then, {one morning|one day}, there was a {small|tiny|little} green {leaf|plant}! "$wow!" $cried
    $hero.
$later, {something {green|small} came up|a {small|green} plant came out of the {ground|earth}}.
    {$hero {danced|jumped} for joy.|}
{After the rain|One morning}, the {garden|ground} was {green|full of {flowers|leaves}}. {"Look!"
    $cried $hero.|}

It grew {and grew|up and up}, {taller than $hero|as {high|big} as the house}. {It had
    {$color|$color2} flowers.|}
{But {then|one night} a {goat|rabbit|storm} came|Then a {cold wind|storm} came}, and {$hero put a
    {box|blanket} over it|it {almost |}broke}.
{Soon|By summer} there were {many |}{$color flowers|$crop|big leaves}. {They smelled
    {sweet|good}.|}

$hero {gave|took} {some|the first one} to {$his $elder|$friend}. "{Thank you|How lovely}!" was
    the answer.
$hero {shared|ate} {the $crop|it} with {everyone|$friend|$his $elder}. {It was {so |very
    }good.|They were $glad.|}
{All the {birds|bees} came|Everyone came} to see {it|the garden}. $hero was $glad.
"""

_MAGIC = """
$oneday, $hero {found|saw} a {strange|shiny|magic|$color} {stone|key|box|bottle|lamp} $spot.
$oneday, {a little star fell|something {bright |}fell} from the sky {and landed $at|$spot}.
One night, $hero {heard a {soft |small |}voice|saw a {soft |small |}light} $spot. It was a
    {tiny|small}
    {fairy|star|dragon}.

"{Hello|Do not be afraid}," it said. "{I can give you one wish|I am {lost|magic}|Make a wish}."
{When|As} $he {touched|took} it, it {began to {glow|sing|talk}.|said, "{Hello|Make a wish},
    $hero."}
"{Who|What} are you?" asked $hero. "I am {a friend|magic|far from home}," it $said {in a soft
    voice|}.

$hero {thought|thought for a long time}. "I {wish for|want} {a $thing2|a lot of $food|a friend},"
    $he said.
"{Can|Will} you {help me|make me {big|fly}}?" asked $hero. "{Yes|I will try}," it said{, and {so
    it did|it glowed}|}.
"{I want to go home|Please help me}," it {said|cried}. "I {will|can} help you," said $hero.
$hero {ran to|told} {$friend|$his $elder} and told the story. "{Show me|Let us see}!" was the
    answer.

There was a {flash|burst} of light! {There was {a $thing2|a mountain of $food}!|$hero {was
    big|could fly}!}
$hero {flew|went} {over the $place|up, up, up}, {over the $place2|past the moon}. {"This is
    {fun|great}!" $he $cried.|}
{All|Soon} {the house|the $place} was full of {$food|light|{$color |}stars}. {$hero laughed.|"Too
    much!" $cried $hero.}
They {climbed|went} {up the {hill|tallest tree}|to the {top of the |}mountain}, {where the stars
    were|in the dark}.

But {then|soon} $hero {was $sad|missed $his $elder}. {"This is not what I want," $he said.|$He
    wanted to go home.}
But {then|soon} $friend {was $sad|came by}. So $hero {gave $fhim {half|some} of it|shared it}.
{The|But the} wish lasted only one {day|night}. {"{That is all right|I do not mind}," said
    $hero.|}

{"{Thank you|Goodbye}," it said{, and {flew|was gone|went up into the sky}}.|Then it {flew|went}
    {up into the sky|home}.}
$later {it was all gone|everything was as before}. {$hero was {back {home|in bed}|$glad}.|}
{Every night|Now}, $hero looked {up |}at the {sky|stars} and {smiled|waved}. {One star was very
    bright.|}
"""

_PLOTS = {
    "lost": _LOST,
    "friend": _FRIEND,
    "fear": _FEAR,
    "gift": _GIFT,
    "trip": _TRIP,
    "broken": _BROKEN,
    "taken": _TAKEN,
    "help": _HELP,
    "race": _RACE,
    "garden": _GARDEN,
    "magic": _MAGIC,
}

_ENDINGS = """
{That night|In the evening}, $hero {told|thought about} the story {again and again|in bed}. {$He
    smiled.|}
{And from that day on|From then on}, $hero {was never $sad again|always helped others|was $glad}.
{They|And they} all lived happily ever after.
{They|And they} all lived happily ever after.
And $hero {never|never ever} forgot that {$nice |}{day|time}.
$hero {went to sleep|fell asleep} with a {big |}smile {on $his face|and a warm heart}.
{It was|It had been} {a good|the best} day {for $hero|of all}. {The stars were {bright|out}.|}
Then $hero {and $his $elder |}went home {and ate {some |}$food|for dinner}. {It was very good.|}
The next day, $hero {went back to the $place|played $game again}. {$weather|}
"What a {good|lovely|strange} day," {said|thought} $hero {and {smiled|laughed}|before $he went to
    bed}.
$his $elder {kissed|hugged} $him good night. "{Sleep well|Sweet dreams}, $hero."

"""

_ASIDES = """
$weather $weather
{Far away|In the village}, a bell {rang|was ringing}. {It was {noon|late}.|Then it was
    {quiet|still} again.}
A {bird|butterfly|bee} {flew|went} by. {"How {pretty|lovely}," thought $hero.|$hero looked at it.}
$hero {thought of|remembered} what $his {mother|father|grandma} {always said|had said}: "{Be
    kind|Be brave|Never give up}."
{Some|Three} {ducks|mice|sheep} {looked on|were watching} from {the other side|far away}. {They
    did not make a sound.|}
{A leaf fell|Some leaves fell} from {a|the} tree. {The wind {sang|was cold}.|Then {it|the wind}
    {stopped|got stronger}.}
{"Hm," {said|thought} $hero.|$hero {waited|stopped} for a {moment|while}.} {Nobody {said|did} a
    thing.|}
{It was almost {noon|evening}|The day was long}, and {the sun was {low|high}|everyone was
    {busy|tired}}.
"""

# Plots in which the friend appears for the first time.
_MEETS_FRIEND = ("lost", "friend")

_MORALS = {
    "lost": "{take good care of things|ask for help|never give up}",
    "friend": "{share|be kind|say hello to others|be a good friend}",
    "fear": "{be brave|try new things|trust others|take one step at a time}",
    "gift": "{try again|give with love|make things by hand|never give up}",
    "trip": "{make the best of a bad day|be patient|stay close to others|look for the good}",
    "broken": "{tell the truth|say sorry|be honest|be more careful}",
    "taken": "{tell the truth|give things back|be honest|ask before you take}",
    "help": "{be kind to everyone|help others|be good to {all |}animals}",
    "race": "{keep trying|work hard|never give up|be kind when others fall}",
    "garden": "{wait|be patient|take care of things|never give up}",
    "magic": "{share|be happy with little|be careful with wishes|be kind to strangers}",
}

_LESSON = """
{And so|That day}, $hero learned to $moral.
$hero {had learned|knew now} that it was {good|important|best} to $moral.
That {day|time}, {$hero|they all} learned {how important it is |}to $moral.
"""

_FEARS = (
    *("the dark", "deep water", "loud sounds", "the {big |}storm", "the old {house|mill}"),
    *("the tall slide", "high places", "big dogs", "the first day of school", "the {big |}waves"),
)


def _pick(rng: Random, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def _two(rng: Random, options: Sequence[str]) -> tuple[str, str]:
    """Two different options."""
    first = _pick(rng, options)
    return first, _pick(rng, [option for option in options if option != first])


def _beats(text: str) -> list[list[str]]:
    """Beats are separated by an empty line, variants by line breaks; indented lines continue."""
    joined = re.sub(r"\n +", " ", text.strip("\n"))
    return [beat.split("\n") for beat in joined.split("\n\n")]


_OPENING_BEATS = _beats(_OPENINGS)
_PLOT_BEATS = {name: _beats(text) for name, text in _PLOTS.items()}
_COMPANION_BEATS, _ASIDE_BEATS = _beats(_COMPANIONS), _beats(_ASIDES)
_ENDING_BEATS, _LESSON_BEATS = _beats(_ENDINGS), _beats(_LESSON)


def _slots(rng: Random, plot: str) -> dict[str, str]:
    """What stays the same throughout one story: hero, friend, family, places, things."""
    gender, friend_gender, elder_gender = (_pick(rng, ("girl", "boy")) for _ in range(3))
    names = _GIRLS if gender == "girl" else _BOYS
    hero = _pick(rng, names)
    friends = [n for n in (_GIRLS if friend_gender == "girl" else _BOYS) if n != hero]
    kind = _pick(rng, _ANIMALS) if rng.random() < 0.4 else gender
    friend_kind, other_kind = _two(rng, [animal for animal in _ANIMALS if animal != kind])
    preposition = _pick(rng, _PREPOSITIONS)
    place, other_place = _two(rng, _PLACES[preposition])
    thing, other_thing = _two(rng, _THINGS)
    food, other_food = _two(rng, _FOODS)
    color, other_color = _two(rng, _COLORS)
    slots = {
        "hero": hero,
        "kind": kind,
        "friend": _pick(rng, friends),
        "fkind": friend_kind,
        "fkind2": other_kind,
        "elder": _pick(rng, _ELDERS[elder_gender]),
        "place": place,
        "place2": other_place,
        "at": f"{preposition} the {place}",
        "at2": f"{preposition} the {other_place}",
        "noun": thing,
        "noun2": other_thing,
        "thing": f"{_pick(rng, (color, *_LOOKS))} {thing}",
        "thing2": f"{_pick(rng, (other_color, *_LOOKS))} {other_thing}",
        "food": food,
        "food2": other_food,
        "crop": _pick(rng, _CROPS),
        "color": color,
        "color2": other_color,
        "fear": _pick(rng, _FEARS),
        "moral": _MORALS[plot],
    }
    for prefix, owner in (("", gender), ("f", friend_gender), ("e", elder_gender)):
        for role, word in zip(("he", "him", "his"), _PRONOUNS[owner], strict=True):
            slots[prefix + role] = word
    return slots


def expand(text: str, slots: Mapping[str, str], rng: Random) -> str:
    """`text` with its alternatives drawn and its slots filled; KeyError names an unknown slot."""
    while found := re.search(r"\{([^{}]*)\}|\$(\w+)", text):
        if found[2] is None:
            value = _pick(rng, found[1].split("|"))
        else:
            name = found[2][0].lower() + found[2][1:]
            value = slots[name] if name in slots else RULES[name]
            if name != found[2]:
                value = value[0].upper() + value[1:]
        text = text[: found.start()] + value + text[found.end() :]
    return text


def _polish(text: str) -> str:
    """Single spaces, "an" before vowels, capitals at the start of sentences."""
    text = re.sub(r" +([ ,.!?])", r"\1", text).strip()
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(^\"?|[.!?] |\.\" )([a-z])", lambda m: m[1] + m[2].upper(), text)


def story(seed: int) -> str:
    """The story of a seed >= 0: about 90 to 180 words, without a line break."""
    rng = Random(seed)
    plot = _pick(rng, list(_PLOTS))
    slots = _slots(rng, plot)
    first, details = _OPENING_BEATS
    lines = [_pick(rng, first), *_two(rng, details)]
    if plot not in _MEETS_FRIEND:
        lines.append(_pick(rng, _COMPANION_BEATS[0]))
    middle = [_pick(rng, beat) for beat in _PLOT_BEATS[plot]]
    if rng.random() < 0.7:
        middle.insert(1 + int(rng.random() * (len(middle) - 1)), _pick(rng, _ASIDE_BEATS[0]))
    lines += middle
    if rng.random() < 0.5:
        lines.append(_pick(rng, _LESSON_BEATS[0]))
    lines.append(_pick(rng, _ENDING_BEATS[0]))
    return " ".join(_polish(expand(line, slots, rng)) for line in lines)


def training_stories() -> Iterator[str]:
    """Stories to train on, without end."""
    return (story(seed) for seed in count(0, 2))


def held_out_stories() -> Iterator[str]:
    """Stories to evaluate on, without end."""
    return (story(seed) for seed in count(1, 2))
