"""What a reader sees of a link in wikitext: its words; nothing of files, categories and links to other Wikipedias."""

import re

ENGLISH_NAMES = frozenset({"media", "file", "image", "category"})

_SISTER = re.compile(r"wikt(?:ionary)?$|commons$|species$|[a-z]+:?(?:wikt|commons)$")
_FILE_NAME = re.compile(  # as no article has; namespaces have more names than dumps give, and a file's has no colon
    r"[^:]*\.(?:jpe?g|png|gif|svg|tiff?|webp|bmp|xcf|djvu|pdf|og[gav]|webm|mp[34]|wav|flac|midi?|stl)\s*$",
    re.IGNORECASE,
)
# Of Wikipedias, open, closed and by other names: `[[fr:x]]` is shown beside the text, not in it.
_LANGUAGES = frozenset(
    (
        "aa ab ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa ay az azb ba ban bar "
        "bat-smg bbc bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm bn bo bpy br bs btm bug bxr ca cbk-zam cdo "
        "ce ceb ch cho chr chy ckb co cr crh cs csb cu cv cy cz da dag de dga din diq dk dsb dtp dty dv dz ee el eml "
        "en eo epo es et eu ext fa fat ff fi fiu-vro fj fo fon fr frp frr fur fy ga gag gan gcr gd gl glk gn gom gor "
        "got gpe gsw gu gur guw gv ha hak haw he hi hif ho hr hsb ht hu hy hyw hz ia iba id ie ig igl ii ik ilo inh "
        "io is it iu ja jam jbo jp jv ka kaa kab kbd kbp kcg kg kge ki kj kk kl km kn knc ko koi kr krc ks ksh ku kus "
        "kv kw ky la lad lb lbe lez lfn lg li lij lld lmo ln lo lrc lt ltg lv lzh mad mai map-bms mdf mg mh mhr mi "
        "min minnan mk ml mn mni mnw mo mos mr mrj ms mt mus mwl my myv mzn na nah nan nap nb nds nds-nl ne new ng "
        "nia nl nn no nov nqo nr nrm nso nup nv ny oc olo om or os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb "
        "pnt ps pt pwn qu rki rm rmy rn ro roa-rup roa-tara rsk ru rue rup rw sa sah sat sc scn sco sd se sg sgs sh "
        "shi shn si simple sk skr sl sm smn sn so sq sr srn ss st stq su sv sw syl szl szy ta tay tcy tdd te tet tg "
        "th ti tig tk tl tly tn to tpi tr trv ts tt tum tw ty tyv udm ug uk ur uz ve vec vep vi vls vo vro wa war wo "
        "wuu xal xh xmf yi yo yue za zea zgh zh zh-cfr zh-classical zh-cn zh-min-nan zh-tw zh-yue zh_classical "
        "zh_min_nan zh_yue zu "
    ).split()
)


def link_text(inner: str, dropped: frozenset[str] = ENGLISH_NAMES) -> str | None:
    """The words of `[[inner]]`; None where the link stands for something beside the text.

    Args:
        inner: what stands between the brackets.
        dropped: names of the namespaces of files and categories, case-folded.
    """
    title, bar, words = inner.partition("|")
    prefix, colon, rest = title.partition(":")
    if colon:
        prefix = prefix.strip()
        name = prefix.casefold()
        hidden = prefix in _LANGUAGES or (not bar and _SISTER.match(name))
        if name in dropped or (hidden and not rest.startswith(" ")) or (prefix and _FILE_NAME.match(rest)):
            return None
    return words if bar else title.strip().lstrip(":")
