//! Slurm's compact lists: tasks per node (`2(x3),1`) and the first host of a node list (`gpu[07-09,12],cpu1`).

/// No cluster has more; a larger repetition is garbage.
const MOST_NODES: usize = 1 << 20;

/// Runs of (tasks, nodes) from `2(x3),1`; `None` when it is not of that form.
fn runs(text: &str) -> Option<Vec<(usize, usize)>> {
    let mut runs = Vec::new();
    let mut nodes = 0usize;
    for item in text.trim().split(',') {
        let (tasks, times) = match item.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse::<usize>().ok()?),
            None => (item, 1),
        };
        let tasks = tasks.parse::<usize>().ok()?;
        nodes = nodes.checked_add(times)?;
        if times == 0 || tasks > MOST_NODES || nodes > MOST_NODES {
            return None;
        }
        runs.push((tasks, times));
    }
    Some(runs)
}

/// The number of tasks on node number `node`: `Err(nodes)` when the list holds only so many nodes, `None` when
/// the text is not of Slurm's form.
pub(crate) fn tasks_on(text: &str, node: usize) -> Option<Result<usize, usize>> {
    let mut seen = 0;
    for (tasks, times) in runs(text)? {
        seen += times;
        if node < seen {
            return Some(Ok(tasks));
        }
    }
    Some(Err(seen))
}

/// All tasks of the list.
pub(crate) fn tasks_in_all(text: &str) -> Option<usize> {
    runs(text)?.iter().try_fold(0usize, |sum, &(tasks, times)| sum.checked_add(tasks.checked_mul(times)?))
}

/// The first host name of a node list.
pub(crate) fn first_host(list: &str) -> Option<String> {
    let list = list.trim();
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (stem, rest) = list.split_at(end);
    let host = match rest.strip_prefix('[') {
        None => stem.to_owned(),
        Some(inner) => {
            let (inner, after) = inner.split_once(']')?;
            let first = inner.split([',', '-']).next()?;
            if first.is_empty() || !first.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            // Text may follow the bracket ("n[1-2]-ib"), up to the next item; a second bracket is not understood.
            let suffix = after.split(',').next().unwrap_or("");
            if suffix.contains('[') {
                return None;
            }
            format!("{stem}{first}{suffix}")
        }
    };
    let sound = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    sound.then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_forms_slurm_writes() {
        assert_eq!(tasks_on("2(x3),1", 0), Some(Ok(2)));
        assert_eq!(tasks_on("2(x3),1", 2), Some(Ok(2)));
        assert_eq!(tasks_on("2(x3),1", 3), Some(Ok(1)));
        assert_eq!(tasks_on("2(x3),1", 4), Some(Err(4)));
        assert_eq!(tasks_in_all("2(x3),1"), Some(7));
        for garbage in ["", "x", "2(x", "2(x3", "2(3)", "-1", "2(x0)", "2,,1", "9(x99999999999)"] {
            assert_eq!(tasks_on(garbage, 0), None, "{garbage}");
        }
    }

    #[test]
    fn the_first_host_of_a_node_list() {
        for (list, host) in [
            ("n1", Some("n1")),
            ("n1,n2", Some("n1")),
            ("gpu[07-09,12],cpu1", Some("gpu07")),
            ("a-b[3]", Some("a-b3")),
            ("n[1-2]-ib,m", Some("n1-ib")),
            ("n[", None),
            ("n[a-b]", None),
            ("[1][2]", None),
            ("", None),
            ("a b", None),
        ] {
            assert_eq!(first_host(list).as_deref(), host, "{list}");
        }
    }

    proptest! {
        #[test]
        fn compressing_and_reading_back_gives_the_same(counts in prop::collection::vec((1usize..9, 1usize..9), 1..9)) {
            let text: Vec<String> = counts.iter()
                .map(|&(t, x)| if x == 1 { t.to_string() } else { format!("{t}(x{x})") }).collect();
            let text = text.join(",");
            let flat: Vec<usize> = counts.iter().flat_map(|&(t, x)| std::iter::repeat_n(t, x)).collect();
            for (node, &tasks) in flat.iter().enumerate() {
                prop_assert_eq!(tasks_on(&text, node), Some(Ok(tasks)));
            }
            prop_assert_eq!(tasks_on(&text, flat.len()), Some(Err(flat.len())));
            prop_assert_eq!(tasks_in_all(&text), Some(flat.iter().sum()));
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".{0,40}", node in 0usize..10) {
            let _ = (tasks_on(&text, node), tasks_in_all(&text), first_host(&text));
        }
    }
}
