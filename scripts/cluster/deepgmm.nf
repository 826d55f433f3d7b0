// Parts of the patients side by side; the folders must be the same for all of them.
//   nextflow run scripts/cluster/deepgmm.nf --patients PATIENTS --out OUT --parts 20 [--options "--protocol brain"]
params.parts = 4
params.options = ''

process SEGMENT {
    tag "${part}/${params.parts}"
    cpus 1
    memory '4 GB'
    input:
    val part
    output:
    val part
    script:
    """
    OMP_NUM_THREADS=1 deepgmm segment '${file(params.patients)}' '${file(params.out)}' --part ${part}/${params.parts} ${params.options}
    """
}

process PAGES {
    input:
    val parts
    script:
    """
    deepgmm report '${file(params.out)}'
    """
}

workflow {
    SEGMENT(Channel.of(1..params.parts)) | collect | PAGES
}
