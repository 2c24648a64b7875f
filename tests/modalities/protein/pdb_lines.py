"""Lines of PDB files, written by hand for tests: each by columns, as the format has them."""


def atom(
    name,
    residue="ALA",
    number=1,
    xyz=(0.0, 0.0, 0.0),
    *,
    chain="A",
    code=" ",
    altloc=" ",
    occupancy=1.0,
    b_factor=10.0,
    record="ATOM",
    element=None,
):
    position = "".join(f"{value:8.3f}" for value in xyz)
    padded = f" {name:<3}" if len(name) < 4 else name
    return (
        f"{record:<6}{1:5d} {padded}{altloc}{residue:>3} {chain}{number:4d}{code}   {position}"
        f"{occupancy:6.2f}{b_factor:6.2f}          {name[0] if element is None else element:>2}  "
    )


def residue(name="ALA", number=1, at=0.0, **options):
    """N, CA, C and O of a residue whose CA lies at `at` on the x axis; C is 1.33 from the N of one 3.8 further on."""
    places = {"N": (-1.2, 0.7, 0.0), "CA": (0.0, 0.0, 0.0), "C": (1.27, 0.7, 0.0), "O": (1.27, 1.9, 0.0)}
    return [atom(atom_name, name, number, (x + at, y, z), **options) for atom_name, (x, y, z) in places.items()]


def written(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


MMCIF_COLUMNS = (
    *("group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id", "label_asym_id"),
    *("label_entity_id", "label_seq_id", "pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "occupancy"),
    *("B_iso_or_equiv", "auth_seq_id", "auth_asym_id", "pdbx_PDB_model_num"),
)


def mmcif(rows, columns=MMCIF_COLUMNS):
    """A file with a table of atoms; each row is words in the order of the columns."""
    tags = "".join(f"_atom_site.{column}\n" for column in columns)
    return "data_test\nloop_\n" + tags + "".join(f"{row}\n" for row in rows)
