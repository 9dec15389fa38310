"""A help desk's questions in Japanese, as people export them: a few templates filled with products, and noise."""

import random

from tests.data.gate.gate_cases import Pair

_NAMES = """
モニター ヒーター ルーター ミキサー プリンター スキャナー スピーカー タイマー トースター ドライヤー クリーナー メーター
モーター アダプター コンピューター コーヒーメーカー ロボット掃除機 空気清浄機 電子辞書 電気毛布 除湿機 加湿器
電動歯ブラシ 扇風機 炊飯器 洗濯機 冷蔵庫 電話機 複合機 USBハブ LEDランプ
"""
PRODUCTS = _NAMES.split()
QUESTIONS = (
    "お世話になっております。先日購入した{}の電源が入らなくなってしまいました。どのように対応すればよいでしょうか。",
    "{}の保証期間について教えてください。購入日から何年間の保証が付いていますか。",
    "法人契約で{}をまとめて購入したいと考えています。見積書の発行をお願いできますか。",
    "{}を返品したいのですが、送料はどちらの負担になりますか。手続きの方法も教えてください。",
    "引っ越しに伴い{}の設置場所を変更したいのですが、注意すべき点はありますか。",
    "昨日届いた{}の外箱に大きなへこみがありました。交換してもらうことはできますか。",
    "{}の取扱説明書を紛失してしまいました。再発行してもらうことはできますか。",
    "{}から異音がします。修理を依頼するにはどこに連絡すればよいですか。",
    "海外出張に{}を持って行きたいと思います。現地の電圧でも問題なく使えますか。",
    "{}の部品だけを購入することはできますか。",
    "古い{}を処分したいです。引き取りサービスはありますか。",
    "{}の色を選べますか。",
)
_DEPARTMENTS = ("総務", "営業", "技術", "経理", "物流", "品質", "広報", "法務", "購買", "企画", "検査", "管理")
_WAYS = ("お電話", "メール", "窓口", "専用フォーム", "担当者への連絡", "店頭")
_THINGS = ("保証書", "購入証明", "お客様番号", "型番の控え", "領収書", "写真")
_CLOSINGS = (
    "翌営業日にご返信いたします。",
    "費用はかかりません。",
    "土日は休業しております。",
    "三日ほどお時間をいただきます。",
)

REWORDED = (
    ("教えてください", "教えて下さい"),
    ("できますか", "できますでしょうか"),
    ("負担になりますか", "負担となりますか"),
    ("ありますか", "ありますでしょうか"),
    ("購入日から", "ご購入日から"),
)
"""Parts of the questions in other words, which ask the same."""


def helpdesk_pairs(seed: int = 0, products: int = len(PRODUCTS)) -> list[Pair]:
    """Every question about so many products, each with its own answer, in any order; written by several people."""
    dice = random.Random(seed)
    pairs = []
    for question in QUESTIONS:
        for product in PRODUCTS[:products]:
            answer = (
                f"{product}については{dice.choice(_DEPARTMENTS)}部が承ります。{dice.choice(_THINGS)}をご用意のうえ、"
                f"{dice.choice(_WAYS)}でご相談ください。{dice.choice(_CLOSINGS)}"
            )
            pairs.append((_as_typed(question.format(product), dice), answer))
    dice.shuffle(pairs)
    return pairs


def _as_typed(text: str, dice: random.Random) -> str:
    """The text with the habits of one writer: spaces, full-width signs, line ends."""
    return dice.choice(
        (
            text,
            text,
            text + "\n",
            text.replace("。", "。\r\n"),
            text.replace("、", "，").replace("。", "．"),
            f"　{text}",
            text.replace("か。", "か？"),
        )
    )
