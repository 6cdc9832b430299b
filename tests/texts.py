"""Thirty sentences in each of six languages, line by line translations of each other."""

from __future__ import annotations

ENGLISH = """\
The train to Berlin leaves at 7:45 from platform 12.
Where can I buy a ticket for tomorrow morning?
My grandmother still bakes bread every Saturday.
It has been raining since Tuesday, and the river is rising.
"We won't be late," she promised, "if you hurry up!"
The new library opened last year next to the old town hall.
He paid €3.50 for a coffee and left without a word.
Could you please speak a little more slowly?
Scientists have found water beneath the surface of the moon.
The children were playing football in the courtyard.
I don't know whether this bus stops at the hospital.
Our company employs about 1,200 people in 14 countries.
After dinner we walked along the beach and watched the stars.
The doctor told him to drink more water and sleep longer.
An area of 10² metres is smaller than you think…
She learned to play the violin when she was six years old.
The museum is closed on Mondays and on public holidays.
Nobody expected the team to win the championship again.
Turn left at the traffic lights, then go straight ahead.
The price of bread has risen by 4.7% since January.
A strong wind blew the roof off the old barn.
They have been living in this house for thirty years.
This soup is too hot; wait a few minutes before eating it.
The minister refused to answer the journalists' questions.
Please switch off your phones before the film begins.
The farmer sold his horses and bought a tractor instead.
In winter the lake freezes, and people skate on it.
I would like a room with a view of the mountains.
The judge will announce the verdict on Friday afternoon.
Reading every day is the best way to learn a language.
""".splitlines()

GERMAN = """\
Der Zug nach Berlin fährt um 7:45 Uhr von Gleis 12 ab.
Wo kann ich eine Fahrkarte für morgen früh kaufen?
Meine Großmutter backt noch immer jeden Samstag Brot.
Seit Dienstag regnet es, und der Fluss steigt.
„Wir kommen nicht zu spät“, versprach sie, „wenn du dich beeilst!“
Die neue Bibliothek wurde letztes Jahr neben dem alten Rathaus eröffnet.
Er bezahlte 3,50 € für einen Kaffee und ging wortlos hinaus.
Könnten Sie bitte etwas langsamer sprechen?
Forscher haben unter der Oberfläche des Mondes Wasser gefunden.
Die Kinder spielten im Hof Fußball.
Ich weiß nicht, ob dieser Bus am Krankenhaus hält.
Unser Unternehmen beschäftigt rund 1.200 Menschen in 14 Ländern.
Nach dem Abendessen gingen wir am Strand entlang und betrachteten die Sterne.
Der Arzt riet ihm, mehr Wasser zu trinken und länger zu schlafen.
Eine Fläche von 10² Metern ist kleiner, als man denkt …
Mit sechs Jahren lernte sie Geige spielen.
Das Museum ist montags und an Feiertagen geschlossen.
Niemand hatte erwartet, dass die Mannschaft wieder Meister wird.
Biegen Sie an der Ampel links ab und gehen Sie dann geradeaus.
Der Brotpreis ist seit Januar um 4,7 % gestiegen.
Ein Sturm riss das Dach von der alten Scheune.
Sie wohnen seit dreißig Jahren in diesem Haus.
Diese Suppe ist zu heiß; warte ein paar Minuten, bevor du sie isst.
Die Ministerin weigerte sich, die Fragen der Journalisten zu beantworten.
Bitte schalten Sie Ihre Telefone aus, bevor der Film beginnt.
Der Bauer verkaufte seine Pferde und kaufte stattdessen einen Traktor.
Im Winter friert der See zu, und die Leute laufen darauf Schlittschuh.
Ich hätte gern ein Zimmer mit Blick auf die Berge.
Der Richter wird das Urteil am Freitagnachmittag verkünden.
Jeden Tag zu lesen ist der beste Weg, eine Sprache zu lernen.
""".splitlines()

CHINESE = """\
开往柏林的火车7点45分从12号站台出发。
在哪里可以买到明天早上的票？
我奶奶每个星期六还是自己烤面包。
从星期二开始一直下雨，河水正在上涨。
“我们不会迟到的，”她保证说，“只要你快一点！”
新图书馆去年在旧市政厅旁边开放了。
他花3.5欧元买了一杯咖啡，一句话没说就走了。
请您说得慢一点，好吗？
科学家在月球表面下发现了水。
孩子们正在院子里踢足球。
我不知道这趟公共汽车在医院停不停。
我们公司在14个国家雇用了大约1,200人。
晚饭后，我们沿着海滩散步，看星星。
医生让他多喝水，睡得久一些。
10²米的面积比你想象的要小……
她六岁的时候学会了拉小提琴。
博物馆星期一和公共假日不开放。
没有人料到这支球队会再次夺得冠军。
在红绿灯处左转，然后一直往前走。
自一月以来，面包价格上涨了4.7％。
一阵大风把旧谷仓的屋顶吹走了。
他们在这座房子里住了三十年。
这碗汤太烫了，等几分钟再喝吧。
部长拒绝回答记者们的问题。
电影开始前请关闭手机。
农夫卖掉了马，买了一台拖拉机。
冬天湖面结冰，人们在上面滑冰。
我想要一间能看到山景的房间。
法官将在星期五下午宣布判决。
每天阅读是学习语言最好的方法。
""".splitlines()

ARABIC = """\
يغادر القطار إلى برلين في الساعة ٧:٤٥ من الرصيف رقم ١٢.
أين يمكنني شراء تذكرة لصباح الغد؟
ما زالت جدتي تخبز الخبز كل يوم سبت.
إنها تمطر منذ يوم الثلاثاء، ومياه النهر ترتفع.
وعدت قائلةً: «لن نتأخر إذا أسرعتَ!»
افتُتحت المكتبة الجديدة في العام الماضي بجانب مبنى البلدية القديم.
دفع ٣٫٥٠ يورو ثمن القهوة وغادر دون أن ينطق بكلمة.
هل يمكنك أن تتحدث ببطء أكثر من فضلك؟
اكتشف العلماء ماءً تحت سطح القمر.
كان الأطفال يلعبون كرة القدم في الفناء.
لا أعرف إن كانت هذه الحافلة تتوقف عند المستشفى.
توظف شركتنا نحو ١٢٠٠ شخص في ١٤ دولة.
بعد العشاء مشينا على الشاطئ وتأملنا النجوم.
نصحه الطبيب بأن يشرب ماءً أكثر وأن ينام مدة أطول.
مساحة ١٠ أمتار مربعة أصغر مما تظن…
تعلمت العزف على الكمان عندما كانت في السادسة من عمرها.
المتحف مغلق أيام الاثنين وفي العطل الرسمية.
لم يتوقع أحد أن يفوز الفريق بالبطولة مرة أخرى.
انعطف يسارًا عند إشارة المرور ثم تابع السير إلى الأمام.
ارتفع سعر الخبز بنسبة ٤٫٧٪ منذ يناير.
اقتلعت ريح قوية سقف الحظيرة القديمة.
يعيشون في هذا البيت منذ ثلاثين سنة.
هذا الحساء ساخن جدًّا؛ انتظر بضع دقائق قبل أن تأكله.
رفضت الوزيرة الإجابة عن أسئلة الصحفيين.
يرجى إغلاق هواتفكم قبل بدء الفيلم.
باع الفلاح خيوله واشترى جرارًا بدلًا منها.
في الشتاء تتجمد البحيرة فيتزلج الناس عليها.
أود غرفة تطل على الجبال.
سيعلن القاضي الحكم بعد ظهر يوم الجمعة.
القراءة كل يوم أفضل طريقة لتعلم لغة جديدة.
""".splitlines()

PERSIAN = """\
قطار برلین ساعت ۷:۴۵ از سکوی ۱۲ حرکت می‌کند.
از کجا می‌توانم برای فردا صبح بلیت بخرم؟
مادربزرگم هنوز هر شنبه نان می‌پزد.
از سه‌شنبه باران می‌بارد و آب رودخانه بالا می‌آید.
او قول داد: «اگر عجله کنی، دیر نمی‌رسیم!»
کتابخانهٔ جدید پارسال کنار شهرداری قدیمی باز شد.
او ۳٫۵۰ یورو برای یک قهوه پرداخت و بی‌آنکه چیزی بگوید رفت.
می‌شود لطفاً کمی آهسته‌تر صحبت کنید؟
دانشمندان زیر سطح ماه آب پیدا کرده‌اند.
بچه‌ها در حیاط فوتبال بازی می‌کردند.
نمی‌دانم این اتوبوس جلوی بیمارستان نگه می‌دارد یا نه.
شرکت ما حدود ۱۲۰۰ نفر را در ۱۴ کشور به کار گرفته است.
پس از شام کنار ساحل قدم زدیم و به ستاره‌ها نگاه کردیم.
پزشک به او گفت که آب بیشتری بنوشد و بیشتر بخوابد.
مساحت ۱۰ متر مربع کوچک‌تر از آن است که فکر می‌کنید…
او در شش‌سالگی نواختن ویولن را یاد گرفت.
موزه دوشنبه‌ها و روزهای تعطیل بسته است.
هیچ‌کس انتظار نداشت که تیم دوباره قهرمان شود.
سر چراغ راهنما به چپ بپیچید و سپس مستقیم بروید.
قیمت نان از ژانویه ۴٫۷٪ بالا رفته است.
باد شدیدی سقف انبار قدیمی را کند.
آن‌ها سی سال است که در این خانه زندگی می‌کنند.
این سوپ خیلی داغ است؛ چند دقیقه صبر کن و بعد بخور.
وزیر از پاسخ دادن به پرسش‌های خبرنگاران خودداری کرد.
لطفاً پیش از آغاز فیلم تلفن‌های خود را خاموش کنید.
کشاورز اسب‌هایش را فروخت و به‌جای آن‌ها تراکتور خرید.
زمستان‌ها دریاچه یخ می‌زند و مردم روی آن اسکیت می‌کنند.
اتاقی می‌خواهم که رو به کوه باشد.
قاضی بعدازظهر جمعه حکم را اعلام می‌کند.
خواندن روزانه بهترین راه یادگیری زبان است.
""".splitlines()

HINDI = """\
बर्लिन जाने वाली रेलगाड़ी ७:४५ बजे प्लेटफ़ॉर्म १२ से चलती है।
कल सुबह का टिकट मैं कहाँ से ख़रीद सकता हूँ?
मेरी दादी आज भी हर शनिवार को रोटी बनाती हैं।
मंगलवार से बारिश हो रही है और नदी का पानी बढ़ रहा है।
उसने वादा किया, "अगर तुम जल्दी करो तो हमें देर नहीं होगी!"
नया पुस्तकालय पिछले साल पुराने नगर भवन के पास खुला।
उसने कॉफ़ी के लिए 3.50 यूरो दिए और बिना कुछ कहे चला गया।
क्या आप थोड़ा धीरे बोल सकते हैं?
वैज्ञानिकों को चाँद की सतह के नीचे पानी मिला है।
बच्चे आँगन में फ़ुटबॉल खेल रहे थे।
मुझे नहीं पता कि यह बस अस्पताल पर रुकती है या नहीं।
हमारी कंपनी में 14 देशों के लगभग 1,200 लोग काम करते हैं।
रात के खाने के बाद हम समुद्र तट पर टहले और तारे देखे।
डॉक्टर ने उसे अधिक पानी पीने और देर तक सोने को कहा।
10² मीटर का क्षेत्रफल आपकी सोच से छोटा है…
छह साल की उम्र में उसने वायलिन बजाना सीखा।
संग्रहालय सोमवार को और सरकारी छुट्टियों पर बंद रहता है।
किसी को उम्मीद नहीं थी कि टीम फिर से प्रतियोगिता जीतेगी।
ट्रैफ़िक लाइट पर बाएँ मुड़ें, फिर सीधे जाएँ।
जनवरी से रोटी का दाम 4.7% बढ़ गया है।
तेज़ हवा पुराने खलिहान की छत उड़ा ले गई।
वे तीस साल से इस घर में रह रहे हैं।
यह सूप बहुत गरम है; पीने से पहले कुछ मिनट रुको।
मंत्री ने पत्रकारों के सवालों का जवाब देने से इनकार कर दिया।
कृपया फ़िल्म शुरू होने से पहले अपने फ़ोन बंद कर दें।
किसान ने अपने घोड़े बेचकर ट्रैक्टर ख़रीद लिया।
सर्दियों में झील जम जाती है और लोग उस पर स्केटिंग करते हैं।
मुझे ऐसा कमरा चाहिए जहाँ से पहाड़ दिखाई दें।
न्यायाधीश शुक्रवार दोपहर को फ़ैसला सुनाएँगे।
हर दिन पढ़ना भाषा सीखने का सबसे अच्छा तरीका है।
""".splitlines()

ALL = {
    "en": ENGLISH,
    "de": GERMAN,
    "zh": CHINESE,
    "ar": ARABIC,
    "fa": PERSIAN,
    "hi": HINDI,
}
